"""`python -m trajshift`, which is also what `torchrun -m trajshift` starts."""

from trajshift.cli.main import main

if __name__ == "__main__":
    main()
