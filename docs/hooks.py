"""MkDocs hook: adds pages whose source lies outside docs/, and points links at them.

Links are written as they work in the repository (`../benchmarks/RESULTS.md`); on the site they become links to pages.
"""

from pathlib import Path

PAGES = {"contributing.md": "CONTRIBUTING.md", "results.md": "benchmarks/RESULTS.md"}
"""Page on the site, and its source below the repository's root."""


def link_to_site(markdown):
    """Returns the text with links to `PAGES` and to pictures as they are on the site."""
    for page, source in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown.replace("](../docs/", "](")


def on_files(files, config):
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    for page, source in PAGES.items():
        text = (root / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=link_to_site(text)))
    return files


def on_page_markdown(markdown, **_):
    return link_to_site(markdown)
