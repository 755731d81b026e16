"""Sets up its logger when it is imported, as packages do."""

import logging

logger = logging.getLogger("package.logs")
handler = logging.NullHandler()
logger.addHandler(handler)
logger.setLevel(logging.INFO)
logger.propagate = False
logging.root.addHandler(handler)
