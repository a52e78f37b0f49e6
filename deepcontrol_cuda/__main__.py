from .cli import main

# Processes that the evidence command starts import this file too.
if __name__ == "__main__":
    raise SystemExit(main())
