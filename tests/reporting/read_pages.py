"""Pages read back as a reader sees them, Markdown and HTML; and a text that is hard to show."""

import re
from html.parser import HTMLParser

NASTY = "a | b\\ <script>alert(1)</script> `x` **c** _d_ [e](http://f.g) &amp; $h$ \"i\" 'j' " + "k" * 200


class HtmlPage(HTMLParser):
    """Tags, which must be balanced, the text of everything and of each cell, and what is linked to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.rows, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def plain(markdown):
    return re.sub(r"\\(.)", r"\1", markdown)


def markdown_rows(text):
    """The cells of every table."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "| ---" not in line]
    return [[plain(cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
