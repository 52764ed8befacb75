"""`python -m llmprune` is the command `llmprune`."""

from llmprune.cli.main import main

if __name__ == "__main__":
    main()
