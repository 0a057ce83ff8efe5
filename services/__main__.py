"""``python -P -m microserve.services``: the ``microserve`` command for this interpreter."""

import sys

# structlog would import rich to draw tracebacks, which nobody here has drawn: half of what it costs, in each
# process of a mesh.
sys.modules["rich"] = None  # type: ignore[assignment]
import structlog  # noqa: E402, F401

del sys.modules["rich"]

from microserve.services.command.main import main  # noqa: E402

if __name__ == "__main__":
    main()
