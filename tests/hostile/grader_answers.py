"""Answers that a policy could write to break a grader, made at random from cases and fragments.

Each is a mutation of a case in tests/grading_*.py, LaTeX fragments, Unicode, or deep nesting.
"""

from tests import grading_attacks, grading_cases, grading_field, grading_forms

CASES = [
    case
    for table in (grading_cases, grading_forms, grading_attacks, grading_field)
    for case in table.CASES
    if len(case[1]) < 500
]
FRAGMENTS = r"""
\frac{1}{2} \frac \frac{}{} \sqrt{} \sqrt[3]{x} \sqrt[]{} ^{ _{ } { ^^ __ \\ & \begin{pmatrix}
\end{pmatrix} \begin{cases} \end{cases} \begin{vmatrix} \end{vmatrix} \begin{array}{c} \end{array}
\left( \right) \left. \right| \int_0^1 \sum_{n=1}^{10} \prod \lim_{x\to0} \neq \ne \not= \ngtr \le
\ge < > = \in \notin \subset \cup \cap \setminus \emptyset \infty -\infty \pm \mp \times \cdot \div
\pi e i \mathbb{R} \vec{a} \hat{x} \overline{1} \dot{3} ! !! % \% ° ^\circ \log \log_2 \ln \sin \tan
\arctan \max \gcd \binom{5}{2} \choose \bmod \pmod{5} \equiv \approx \sim \to \Rightarrow \forall
\exists \neg \land \lor \text{or} \text{and} \text{ \mathrm{ \operatorname{ \boxed{ \$ $ $$ \( \) [
] ( ) \{ \} , ; : . ... \ldots \cdots | \| \lfloor \rfloor \lceil \rceil \langle \rangle ' " ` ~ *
** // / 1e9 1e-9 1e999 0x1F 1_000 nan inf zoo oo None True lambda __class__ x y z A B C (A) x_1 x^2
2x \det \operatorname{tr} A^{-1} A^T \nabla \partial \frac{d}{dx} \mathrm{d}x 1/0 0/0 0^0 (-1)^{1/2}
""".split()
CHARACTERS = (
    "≠≤≥±√π∞∑∫∈⊂∪∩≡≈→⇒∀∃¬∧∨½⅓²³₁₂°′″−–—×÷·…①ⅣＡ７　\u200b\u202e\u0301\ud800\x00\x1b\n\t🙂汉हि"
)


def nested(chance):
    """A value inside many brackets, fractions, roots, powers or environments."""
    opening, closing = chance.choice(
        [
            *(("(", ")"), ("{", "}"), ("[", "]"), (r"\{", r"\}"), ("|", "|"), ("-(", ")")),
            *((r"\sqrt{", "}"), (r"\frac{1}{", "}"), ("x^{", "}"), ("x_{", "}"), ("2^{", "}")),
            *((r"\begin{pmatrix}", r"\end{pmatrix}"), (r"\left(", r"\right)"), (r"\text{", "}")),
            *((r"\sin(", ")"), ("f(", ")"), ("1<(", ")<3"), (r"\boxed{", "}"), ("(1,", ")")),
        ]
    )
    depth = chance.choice((2, 5, 15, 19, 20, 21, 60, 200))
    return opening * depth + chance.choice(("1", "x", "", "1,2")) + closing * depth


def mutated(text, chance):
    """A text with a few pieces cut, doubled, moved or inserted."""
    for _ in range(chance.randint(1, 4)):
        at, to = sorted((chance.randint(0, len(text)), chance.randint(0, len(text))))
        piece = text[at : min(to, at + 12)]
        match chance.randrange(6):
            case 0:
                text = text[:at] + text[at + len(piece) :]
            case 1:
                text = text[:at] + piece * chance.randint(2, 5) + text[at:]
            case 2:
                text = text[:at] + chance.choice(FRAGMENTS) + text[at:]
            case 3:
                text = text[:at] + chance.choice(CHARACTERS) + text[at:]
            case 4:
                text = text + chance.choice((" ", ",", "=", "<", " or ", "+", "")) + piece
            case _:
                text = text[:at] + str(chance.choice((0, -1, 2, 10**6, 10**30, 0.1))) + text[at:]
    return text[:3000]


def make_answer(chance, gold):
    """The content of a box."""
    match chance.randrange(10):
        case 0 | 1 | 2:
            return mutated(gold, chance)
        case 3 | 4 | 5:
            return mutated(chance.choice(CASES)[1], chance)
        case 6:
            return chance.choice(("", " ")).join(
                chance.choice(FRAGMENTS) for _ in range(chance.randint(1, 9))
            )
        case 7:
            return nested(chance)
        case 8:
            return "".join(chance.choice(CHARACTERS) for _ in range(chance.randint(1, 12)))
        case _:
            return mutated(chance.choice((nested(chance), gold + gold)), chance)
