"""The writer of every ``report.md``, of tables in Markdown, and of what pages of documentation say in numbers."""

import re

from unrolled_kernels.experiments.run_directory import atomic_path

_SECTION = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head, rows, left=0):
    """A Markdown table.

    Args:
        head: the titles of its columns.
        rows: their cells, strings or numbers.
        left: how many columns, from the left, are words; the others are numbers and end at the right.
    """
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def diverged(results):
    """A sentence on the models without a loss, which are left out of every mean; empty where there are none."""
    count = int(results["train"].isna().sum())
    return f" {count} of them diverged and are left out." if count else ""


def write(path, *, title, introduction="", settings, figures, sections):
    """Write a report.

    Args:
        path: the file.
        title: its heading.
        introduction: the paragraph below.
        settings: of the run, a dict.
        figures: paths of the figures, in the same directory.
        sections: a dict from heading to Markdown text; empty text has no section.
    """
    text = [f"# {title}", "", *([introduction, ""] if introduction else [])]
    text += [table(("setting", "value"), settings.items(), left=2), "", "## Figures", ""]
    text += [f"![{figure.stem}]({figure.name})\n" for figure in figures]
    for heading, body in sections.items():
        text += [f"## {heading}", "", body, ""] if body else []
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")


def filled(page, text):
    """The text of a page whose parts from ``<!-- generated: NAME -->`` to ``<!-- end -->`` are ``text[NAME]``.

    Raises:
        ValueError: ``text`` has no such name.
    """
    missing = {name for _, name, _ in _SECTION.findall(page)} - set(text)
    if missing:
        raise ValueError(f"nothing generates {sorted(missing)}")
    return _SECTION.sub(lambda found: f"{found[1]}\n{text[found[2]]}\n\n{found[3]}", page)


def fill(pages, text):
    """Fill files in place, see ``filled``, and print their names."""
    for page in pages:
        whole = filled(page.read_text(encoding="utf-8"), text)
        with atomic_path(page) as temporary:
            temporary.write_text(whole, encoding="utf-8")
        print(page)
