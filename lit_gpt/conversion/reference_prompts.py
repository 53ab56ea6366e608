"""The prompts on which an export is compared with its source."""

from lit_gpt.text.messages import Message

TEXTS = (
    "The capital of France is Paris, isn't it?",
    "Q: What is 12 * 345? Show each step.\n\nA: 12 * 345 = 4140",
    "def square(x):\n    return x * x  # 2nd power",
    "Füße, naïve café, 你好, Привет, 🙂 and <b>tags</b>",
)
CONVERSATIONS: tuple[list[Message], ...] = (
    [{"role": "user", "content": TEXTS[1]}],
    [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi, what can I do for you?"},
        {"role": "user", "content": TEXTS[3]},
    ],
)
LENGTH = 24  # how many tokens of each prompt logits are compared on
POSITIONS = (len(TEXTS) + len(CONVERSATIONS)) * LENGTH
