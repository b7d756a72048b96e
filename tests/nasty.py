"""Names that somebody may give a class or a folder, and that no display may obey or fail at."""

NASTY_NAMES = (
    "a$b$_^{",
    r"c $\frac{1$",
    "[red]rose[/] [/bold]",
    ":cat: :rose:",
    "ros\udce9",
    "two\nlines",
    "\x1b[31mred\x1b[2J",
    "\u202eabc",
    "=1+1",
    "\u685c \u3072\u307e\u308f\u308a",
    "\U0001f469\u200d\U0001f33e",
    "x" * 300,
    "",
)
