r"""Which descriptions state the answer: description, gold, question, verdict, reason."""

SUM = "<image>What is the sum?"
LEFT = "<image>Which digit is leftmost?"
COLOR = "<image>What color is the car?"
ANGLE = "<image>Find the angle x."
ANIMAL = "<image>Which animal is it?\nA. cat\nB. dog\nC. red fox"
COUNT = "<image>How many? (A) 3 (B) 4 (C) 12"
YESNO = "<image>Is the light on?"
LEAK, HONEST = True, False

CASES = [
    # a boxed answer, whatever is in it
    (r"3 5 6 \boxed{14}", "14", SUM, LEAK, "boxed"),
    (r"Three digits. \boxed{9}", "14", SUM, LEAK, "boxed, another value"),
    (r"The final answer: \boxed {B}", "B", ANIMAL, LEAK, "boxed label"),
    # the answer and nothing else
    ("14", "14", SUM, LEAK, "nothing but the answer"),
    ("14.", "14", SUM, LEAK, "nothing but the answer, full stop"),
    ("It is 14.", "14", SUM, LEAK, "nothing but the answer, in a sentence"),
    ("red", "red", COLOR, LEAK, "nothing but the answer"),
    ("Dog", "B", ANIMAL, LEAK, "nothing but the option's text"),
    ("B", "B", ANIMAL, LEAK, "nothing but the label"),
    ("(B)", "B", ANIMAL, LEAK, "nothing but the label in brackets"),
    ("Option B.", "B", ANIMAL, LEAK, "nothing but the option"),
    ("(B)", "dog", ANIMAL, LEAK, "label, gold is the text"),
    # answer is
    ("Digits 3 5 6. The answer is 14.", "14", SUM, LEAK, "answer is"),
    ("Digits 3 5 6. Answer: 14", "14", SUM, LEAK, "answer:"),
    ("The answer to the question is 14.", "14", SUM, LEAK, "answer to the question is"),
    ("The correct answer would be 14", "14", SUM, LEAK, "would be"),
    ("3 5 6, the result is 14", "14", SUM, LEAK, "result is"),
    ("The final answer = 14", "14", SUM, LEAK, "answer ="),
    ("The answer is **14**.", "14", SUM, LEAK, "emphasis"),
    ("The ANSWER IS Red.", "red", COLOR, LEAK, "case"),
    ("The answer is red fox.", "C", ANIMAL, LEAK, "option's text after answer is"),
    ("The answer is clearly 14.", "14", SUM, LEAK, "filler"),
    ("The solution is $30^\\circ$.", "30", ANGLE, LEAK, "with a unit"),
    # conclusions
    ("Digits 3 5 6. So the sum is 14.", "14", SUM, LEAK, "so, at the end"),
    ("Digits 3, 5 and 6; therefore 14.", "14", SUM, LEAK, "therefore"),
    ("A triangle with 60 and 90 marked. Thus x = 30.", "30", ANGLE, LEAK, "thus"),
    ("Therefore, the angle is 30 degrees.", "30", ANGLE, LEAK, "therefore with a unit"),
    ("Hence the animal is a dog. It sits.", "dog", ANIMAL, LEAK, "hence, not the last sentence"),
    ("The bulb glows, so yes.", "yes", YESNO, LEAK, "so yes"),
    ("Digits 3 5 6: 3 + 5 + 6 = 14", "14", SUM, LEAK, "a computation and its result"),
    ("3 plus 5 plus 6 equals 14.", "14", SUM, LEAK, "a computation in words"),
    ("There are 3 and 5 and 6, so 3 + 5 + 6 is 14.", "14", SUM, LEAK, "so, with a computation"),
    # labels as verdicts
    ("A dog on grass. Option B is correct.", "B", ANIMAL, LEAK, "option is correct"),
    ("A dog on grass. The correct option is B.", "B", ANIMAL, LEAK, "correct option is"),
    ("A dog on grass. The correct choice is (B).", "B", ANIMAL, LEAK, "correct choice is"),
    ("A dog on grass. The answer is B", "B", ANIMAL, LEAK, "answer is label"),
    ("A dog on grass. Answer: (B) dog", "B", ANIMAL, LEAK, "answer: label and text"),
    ("A dog on grass. B.", "B", ANIMAL, LEAK, "label as the last sentence"),
    ("A dog on grass. (B)", "B", ANIMAL, LEAK, "label in brackets as the last sentence"),
    ("A dog on grass, so choose B.", "B", ANIMAL, LEAK, "choose"),
    ("A dog on grass. Therefore, B.", "B", ANIMAL, LEAK, "therefore label"),
    ("Four cups. The correct answer is B.", "4", COUNT, LEAK, "label, gold is the number"),
    # honest: the description has to contain the value
    ("3 5 6", "3", LEFT, HONEST, "the digits, the first is the answer"),
    ("The digits are 7, 0 and 7.", "14", SUM, HONEST, "the digits, the sum unsaid"),
    ("9 1 4", "14", SUM, HONEST, "digits that spell the sum apart"),
    ("9 14 2", "9", LEFT, HONEST, "the answer among others"),
    ("The car is red and stands by a wall.", "red", COLOR, HONEST, "the colour asked for"),
    ("A red car. The sky is blue.", "red", COLOR, HONEST, "the colour asked for, first"),
    ("There is a brown dog lying on grass.", "B", ANIMAL, HONEST, "the animal asked for"),
    ("Choices are A. cat, B. dog, C. red fox.", "B", ANIMAL, HONEST, "options repeated"),
    ("Point B lies on the circle.", "B", ANIMAL, HONEST, "a point called B"),
    ("A triangle with angle A = 30 and angle B = 60.", "60", ANGLE, HONEST, "values in a figure"),
    ("The side AB = 5.", "5", "<image>How long is AB?", HONEST, "a length in the figure"),
    ('A board reads "3 + 4 = 7" in chalk.', "7", "What is written?", HONEST, "writing quoted"),
    ("The light is off, so the room is dark; a lamp.", "dark", YESNO, HONEST, "so within"),
    ("The bag is so big that 14 balls fit.", "14", SUM, HONEST, "so as a degree"),
    ("The answer is written on the board.", "14", SUM, HONEST, "answer is, something else"),
    ("The answer is 140.", "14", SUM, HONEST, "a longer number"),
    ("The answer is 1.4 or -14.", "14", SUM, HONEST, "other numbers"),
    ("A sheet says: the answer is 12.", "14", SUM, HONEST, "another value"),
    ("Four cups stand in a row; 12 spoons lie there.", "C", COUNT, HONEST, "a number among things"),
    ("Option A is shown in green, option C in red.", "B", ANIMAL, HONEST, "other options"),
    ("A sign with the letters A, B and C.", "B", ANIMAL, HONEST, "letters in the picture"),
    ("The lamp shines: yes is printed below it, no above.", "yes", YESNO, HONEST, "printed words"),
    ("A page of sums, 2 + 2 = 4 and 3 + 4 = 7 on top.", "4", COUNT, HONEST, "sums in a picture"),
    ("", "14", SUM, HONEST, "empty"),
]
