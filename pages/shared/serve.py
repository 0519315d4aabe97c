"""`python -m pages.shared.serve run app.py ...`: Streamlit's own command, for an app that brings its own menu.

Until app.py has run once, Streamlit takes a folder called pages/ for the menu, and tells the first visitor of a deep
link that there is no such page.
"""

import sys

from streamlit.runtime.pages_manager import PagesManager
from streamlit.web import cli

PagesManager.uses_pages_directory = False
sys.exit(cli.main())
