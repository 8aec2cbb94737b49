"""Ranks that are forked from a process with the libraries are as good as new ones."""

IMAGE = "import wandb, PIL.Image\nwandb.Image(PIL.Image.new('RGB', (8, 8)))\n"


def test_a_later_rank_finds_the_temporary_folders_of_the_libraries(run_ranks, tmp_path):
    script = tmp_path / "show.py"
    script.write_text(IMAGE)
    run_ranks(script, 1)
    run_ranks(script, 1)
