"""What is on a page of AppTest."""

import re

NASTY = "<b>bold</b> **stars** $x^2$ [a](http://b)"


def press(app, label):
    next(button for button in app.button if button.label == label).click().run()
    assert not app.exception


def labels(app):
    return {button.label for button in app.button}


def shown(app):
    """All that can be read on the page, markup included."""
    kinds = (app.html, app.caption, app.text, app.markdown, app.error, app.warning, app.info, app.code, app.subheader)
    values = [getattr(element, "value", None) or getattr(element, "body", "") for kind in kinds for element in kind]
    texts = [progress.proto.text for progress in app.get("progress")]
    return "\n".join([*map(str, values), *texts]).replace("\\", "")


def facts(app):
    found = [element.body for element in app.html if "tl-facts" in element.body and "<style>" not in element.body]
    return re.sub(r"<[^>]+>", " ", " ".join(found))
