"""``python -P -m microserve.services``: the ``microserve`` command for this interpreter."""

from microserve.services.command.main import main

if __name__ == "__main__":
    main()
