r"""Answers on which math-verify or sympy raises, each with a gold answer, found by fuzzing."""

RAISING = [
    ("5", "0 \\cdot \\infty"),
    ("5", "\\infty - \\infty"),
    ("5", "\\frac{0}{0x}"),
    ("5", "\\begin{pmatrix} 1 & 2 \\\\ 2 & 4 \\end{pmatrix}^{-1}"),
    ("5", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}^{1000}"),
    (
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}^{1000}",
    ),
    ("\\$5", "0/**0V"),
    ("90", "9x^2-\\infty0"),
]
