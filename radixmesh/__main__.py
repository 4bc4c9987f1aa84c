"""`python -m radixmesh`."""

from radixmesh.cli import main

if __name__ == "__main__":
    main()
