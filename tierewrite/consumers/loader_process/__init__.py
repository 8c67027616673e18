"""What runs in the consumer's own Python: scripts import these modules by their file names, and nothing of tierewrite.

`dry_process` answers the command line, `dry_writes` records which key writes which elements of which parameter,
`dry_coverage` counts them.
"""
