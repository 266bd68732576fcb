"""Tables of measurements in Markdown, and their places in the docs."""

import re
import sys


def table(heading, rows):
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(page, mark, text):
    """Puts the text between <!-- mark --> and the next <!-- end --> of the page."""
    content = page.read_text()
    place = re.compile(rf"(<!-- {re.escape(mark)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not place.search(content):
        sys.exit(f"{page.name} has no place for {mark}")
    page.write_text(place.sub(lambda found: f"{found[1]}{text}\n{found[2]}", content))
