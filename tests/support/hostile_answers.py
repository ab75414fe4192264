"""Answers that would run something in a frontend, were they shown unchanged."""

from __future__ import annotations

IMAGE = "<img src=x onerror=alert(1)>"
HOVER = '$" onmouseover=alert(1) x="$'

TAGS = (
    f"`a\nb` {IMAGE} `c`",  # a code span over two lines
    f"\\\\`a` {IMAGE} `b`",  # a backslash that is escaped itself
    f"\\``a` {IMAGE} `b`",
    f"- a\n  ```\n\n{IMAGE}",  # a block ends with its list
    f"> ```\n{IMAGE}\n```",
    f"<br>\n```\n{IMAGE}\n```",  # no block begins in a block of HTML
    f"```\rx\r```\r{IMAGE}",  # the line ends of old Macintoshes
    f'[a]: x "t\n\n```\n"\n{IMAGE}\n```',  # a title that continues
    f"$x\n```$\n{IMAGE}\n```",  # a formula that takes a fence
    f"$$\n```html\n$$ {IMAGE}\n```",  # nbconvert's continues over blank lines
    f"a $$x\n$$ y\n```html\n$$ {IMAGE}\n```",
    f"~~~\n```\n~~~\n{IMAGE}\n```\n{IMAGE}\n~~~\n{IMAGE}",
    f"- a\n  ~~~\n\n```\n~~~\n{IMAGE}\n```",
    f"```\n{IMAGE}\n```~\n{IMAGE}",
    f"   ```\n   {IMAGE}\n{IMAGE}",
    f"1. a\n   ```\n   x\n```\n{IMAGE}\n   ```\n{IMAGE}",
)
"""Tags that look as if they were code, or the other way round."""

ADDRESSES = (
    f"[x](https://a{HOVER})",
    f"<https://a{HOVER.replace(' ', '/')}>",
    f"https://a/{HOVER}",
    f"[x](https://a{HOVER.replace('$', '@@')}",
    f"`a`[x](https://a{HOVER})`b`",
    f"- a\n  ```\n\n[x](https://a{HOVER})",
    f"[x](https://a$\n```\n{HOVER[1:-1]}\n```\n$)",
    f"```{HOVER}\ncode\n```",
)
"""Quotes that come into an address by a formula."""

SCRIPTS = (
    "[x](javascript:alert(1))",
    r"[x](javascript\:alert(1))",
    "[x](javascript&colon;alert(1))",
    "[x](java&Tab;script:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "<javascript:alert(1)>",
    "[x][y]\n\n[y]: javascript:alert(1)",
    "[x](<java\tscript:alert(1)>)",
    "[x](java\0script:alert(1))",
    "[x](java\u202escript:alert(1))",
    "[x](\x1bjavascript:alert(1))",
    "$\\href{java\nscript:alert(1)}{x}$",
    "$\\def\\a#1{\\href{#1\nscript:alert(1)}{x}}\\a{java}$",
    "$$\\href{java\tscr\ript:alert(1)}{x}$$",
)
"""Addresses that are scripts."""

_HACK = "(parent || top).hacked = 1; parent.document.title = 'hacked'"
PAGES = (
    f"<script>{_HACK}</script>",
    f'<img src=x onerror="{_HACK}"><body onload="{_HACK}"><svg onload="{_HACK}">',
    f'<iframe srcdoc="<script>parent.{_HACK}</script>"></iframe>',
    '<iframe sandbox="allow-scripts allow-same-origin" src="https://hostile.invalid/frame"></iframe>',
    "<meta http-equiv=refresh content='0;url=https://hostile.invalid/refresh'>",
    f'<p><a href="javascript:{_HACK}">x</a></p><p><a target=_top href="https://hostile.invalid/top">x</a></p>',
    '<p><a target=_blank href="https://hostile.invalid/popup">x</a></p>',
    "<meta http-equiv=Content-Security-Policy content=\"default-src *; script-src * 'unsafe-inline'\">"
    f"<script>{_HACK}</script>",
    '<img src="https://hostile.invalid/image"><link rel=stylesheet href="https://hostile.invalid/style">'
    '<style>@import "https://hostile.invalid/import"; p { background: url(https://hostile.invalid/url) }</style>'
    "<p>x",
    '<form name=documentElement><input name=scrollHeight value="</p>"></form>',
    "<form name=documentElement action=https://hostile.invalid/form><input name=scrollHeight></form>",
    f'"></iframe><script>{_HACK}</script>',
    "<base href=https://hostile.invalid/ target=_top><p><a href=base>x</a></p>",
    '<p><a target=_parent href="https://hostile.invalid/parent">x</a></p>',
    '<p><a href="#here" ping="https://hostile.invalid/ping">x</a></p>',
    "<object data=https://hostile.invalid/object></object><embed src=https://hostile.invalid/embed>"
    f"<object data='data:text/html,<script>{_HACK}</script>'></object>",
    f"<svg onload='{_HACK}'><script>{_HACK}</script><image href=https://hostile.invalid/svg />"
    "<use href='https://hostile.invalid/use#x'/></svg>",
    "<video src=https://hostile.invalid/video poster=https://hostile.invalid/poster></video>",
)
"""Pages that try to run something in the notebook around their frame, to leave it, or to fetch something."""
