r"""Answers that look like the reference and are wrong: every grader must say so.

Not among them, since math-verify takes them for equal and a problem's wording usually allows both:
a number and the same number of percent (`50`, `50\%`), a quantity without its unit or its base.
"""

# Reference, then wrong answers.
NEAR_MISSES: dict[str, tuple[str, ...]] = {
    # Numbers
    "5": ("", "5.1", "-5", "55", r"\text{five or six}", "5!", "5, 6", "5i"),
    "204": ("20", "204.5", "2040", "402"),
    "025": ("52", "0.25", "250"),
    "0.15": ("0.51", "1.5", "15"),
    ".0000672": (".000672", "0.0000671"),
    ".35625": (".35626", "35625"),
    "16": ("2^{16}", "1.6", "61"),
    "8": (r"\sqrt{8}", "2^8", r"\frac{1}{8}"),
    r"10,\!080": ("10", "10.08", "1080"),
    r"11,\! 111,\! 111,\! 100": ("11,111,111,101", "11"),
    r"\$32,\!348": ("32", "32.348", r"\$32,\!384"),
    "x=5": ("x=-5", "y=5", "6"),
    # Fractions, roots, constants
    r"\frac{14}{3}": (r"\frac{3}{14}", "4.66", r"\frac{14}{5}", r"-\frac{14}{3}"),
    r"1\frac{4}{5}": (r"\frac{4}{5}", r"1\frac{5}{4}", "1"),
    r"137 \frac{1}{2}": ("137", r"\frac{137}{2}", "138"),
    r"3\sqrt{13}": (r"13\sqrt{3}", r"\sqrt{39}", "10.8", r"3\sqrt{31}"),
    r"\pi": ("3.14", r"\frac{22}{7}", r"2\pi", "p"),
    r"288 \pi": ("288", r"\frac{288}{\pi}", r"288\pi^2"),
    r"\frac{20000}{\pi}": (r"\frac{\pi}{20000}", r"20000\pi"),
    r"90^\circ": (r"80^\circ", r"9^\circ", r"\pi"),
    "52_8": ("52_7", "53_8", "42"),
    "4210_{5}": ("4210_6", "4201_5"),
    # Complex numbers and formulas
    "6 - 5i": ("6 + 5i", "5 - 6i", "6 - 5"),
    "-2 + 7i": ("2 - 7i", "7 - 2i"),
    "p - q": ("q - p", "p + q", "p"),
    "x^5 - x^4 + x^3 - x^2 + x - 1": ("x^5 - x^4 + x^3 - x^2 + x + 1", "x^5 - x^4 + x^3 - x^2 + x"),
    "(a+5)(b+2)": ("(a+2)(b+5)", "(a+5)(b-2)", "ab+10"),
    r"\frac{11+9a}{20}": (r"\frac{11-9a}{20}", r"\frac{11+9b}{20}", r"\frac{20}{11+9a}"),
    "2k+2": ("2k", "2n+3", "k+1"),
    "5r^5": ("5r^4", "(5r)^5"),
    "3R^2": ("3R", "9R^2"),
    r"\cot x": (r"\tan x", r"\cot 2x"),
    # Equations
    "y = 2x + 3": ("y = 3x + 2", "x = 2y + 3", "y = 2x - 3"),
    "5x - 7y + 11z + 4 = 0": ("5x - 7y + 11z - 4 = 0", "5x - 7y + 11z = 4"),
    # Several values
    "1,-2": ("1", "1,2", "1,-2,3", "-1,2"),
    "3, 5, 7": ("3,5", "3, 5, 9", "357"),
    r"1 \pm \sqrt{19}": (r"1 + \sqrt{19}", r"-1 \pm \sqrt{19}", r"1 \pm \sqrt{91}"),
    r"\{1\pm\sqrt{5},-2\}": (r"\{1\pm\sqrt{5},2\}", r"\{1\pm\sqrt{5}\}"),
    # Points, intervals, matrices
    r"\left( 3, \frac{\pi}{2} \right)": (
        r"\left( 3, \frac{\pi}{3} \right)",
        r"\left( \frac{\pi}{2}, 3 \right)",
        "3",
    ),
    "(6,31,-1)": ("(6,31,1)", "(31,6,-1)", "(6,31)"),
    "(-2,1)": ("(1,-2)", "(-2,-1)"),
    "(3,4]": ("[3,4]", "(3,4)", "[3,4)", "(3,5]"),
    r"(2,\infty)": (r"[2,\infty)", r"(-\infty,2)", "2"),
    r"x \in [-2,7]": (r"x \in (-2,7]", r"x \in [-2,7)", r"x \in [2,7]"),
    r"(0,9) \cup (9,36)": ("(0,36)", r"(0,9] \cup [9,36)", "(0,9)"),
    r"\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right]": (
        r"\left[ \frac{\pi}{8}, \frac{5 \pi}{4} \right]",
        r"\left( \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right)",
    ),
    r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}": (
        r"\begin{pmatrix} 1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
        r"\begin{pmatrix} -1/3 \\ 5/3 \\ 2/3 \end{pmatrix}",
    ),
    r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}": (
        r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}",
        r"\begin{pmatrix} 0 & -1 \\ -1 & 0 \end{pmatrix}",
    ),
    # Words and letters
    r"\text{Evelyn}": (r"\text{Carla}", "E", r"\text{Eve}", "nylevE"),
    r"\text{(C)}": ("(D)", r"\text{(A)}", "B"),
    r"\text{even}": ("odd", r"\text{neven}", "evenly"),
    r"\text{east}": ("seat", "west", r"\text{eats}"),
    # Quantities
    r"5.4 \text{ cents}": ("54", r"5.3 \text{ cents}"),
    r"864 \mbox{ inches}^2": ("846", r"864^2"),
}
