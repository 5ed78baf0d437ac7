"""stub."""
def write_page(summary, page, title=None): page.write_text("stub")
def render_page(summary, title=None): return ""
