"""The writer of every ``report.md``, and of tables in Markdown."""

from unrolled_kernels.experiments.run_directory import atomic_path


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
