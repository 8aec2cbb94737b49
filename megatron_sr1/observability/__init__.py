"""What a run tells: metrics files, sinks and the HTML report."""
