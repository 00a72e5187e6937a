"""What the pages of the documentation show."""

import re


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def run_blocks(page):
    """Run a page's blocks in one namespace, in order."""
    names = {"__name__": "__main__"}
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), names)
    return names
