"""The page that operators open in a browser, at ``/``: files only, no Python and no build step.

Owns HTML, CSS and ES modules; must not know more than ``/view`` says (``view/forms.py`` of the gateway) and
what the APIs answer. Start at ``index.html``, then ``main.js``; a file for each view in ``view/``.
``../page_routes.py`` serves them.

Texts come to the page by ``fetch`` and go into it as text nodes alone (preact's): nothing of it is markup.
There is no inline script or style, and nothing is asked of another server.

``vendor/`` is other people's, unchanged, with licences; a test holds it to ``vendor/SHA256SUMS``:

- htm 3.1.1 (npm, ``preact/standalone.module.js``, with the preact that it was built with)
- uPlot 1.6.32 (npm, ``dist/uPlot.iife.min.js`` and ``dist/uPlot.min.css``)
"""
