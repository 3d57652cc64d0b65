"""``python -m millstream.pipeline`` is the ``millstream`` command, whatever is on the PATH."""

from millstream.pipeline.cli.main import main

main()
