import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.errors import UserError
from pipeline.data.chat import UnfitError, divided, exchange, is_dialogue, prompt_text, spelled, transcript, turns_of
from pipeline.models.prompting import Prompter

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
WORDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(str.strip)
FIRST = "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: How?\n\nAssistant:"


def said(role, content):
    return {"role": role, "content": content}


@QUICK
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), WORDS, st.booleans())
def test_messages_are_spelled_and_read_back(answered, last, instructed):
    messages = [said("system", "Be kind.")] if instructed else []
    messages += [said(*turn) for pair in answered for turn in zip(("user", "assistant"), pair, strict=True)]
    messages.append(said("user", last))
    assert turns_of(spelled(messages)) == [said(m["role"], m["content"].strip()) for m in messages]


@QUICK
@given(WORDS)
def test_one_question_is_its_own_prompt(text):
    assert turns_of(spelled([said("user", text)])) == [said("user", text)]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([said("user", "a\n\nAssistant: b")], "the mark of a turn inside a message"),
        ([said("user", "Human: b")], "the mark of a turn inside a message"),
        ([said("user", "a"), said("assistant", " "), said("user", "b")], "an empty message"),
        ([said("tool", "a")], "a message of the role tool"),
        ([said("user", "a"), said("assistant", "b")], "a prompt that no user asks"),
        ([], "a prompt that no user asks"),
    ],
)
def test_messages_that_are_no_prompt_are_refused(messages, reason):
    with pytest.raises(UnfitError, match=reason):
        spelled(messages)


@pytest.mark.parametrize(
    ("chosen", "rejected", "parts"),
    [
        (FIRST + " Slowly.", FIRST + " Fast.", (FIRST, " Slowly.", " Fast.")),
        (FIRST + " So.", FIRST + " So. And so.", (FIRST, " So.", " So. And so.")),
        (FIRST + " The same start.", FIRST + " The same end.", (FIRST, " The same start.", " The same end.")),
        (FIRST, FIRST + " Fast.", (FIRST, "", " Fast.")),
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),
        ("The sky is", "The sky is black.", ("The sky is", "", " black.")),
    ],
)
def test_texts_are_divided_behind_what_they_share(chosen, rejected, parts):
    assert divided(chosen, rejected) == parts
    assert divided(rejected, chosen) == (parts[0], parts[2], parts[1])


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("Yes", "No", "texts that share no prompt"),
        ("Yesterday", "Yes", "texts that share no prompt"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: b", "transcripts that share no answer"),
        (FIRST + " a\n\nHuman: b\n\nAssistant: c", FIRST + " d", "transcripts that part before the last answer"),
    ],
)
def test_texts_that_cannot_be_divided_are_refused(chosen, rejected, reason):
    with pytest.raises(UnfitError, match=reason):
        divided(chosen, rejected)


@pytest.mark.parametrize("spelling", [str.lstrip, lambda text: text.replace("\n", "\r\n"), lambda text: "\n" + text])
def test_transcripts_with_other_line_ends_are_divided_alike(spelling):
    texts = [spelling(FIRST + answer) for answer in (" Yes, I can.", " Yes, but no.")]
    assert divided(*texts) == (FIRST, " Yes, I can.", " Yes, but no.")
    assert divided(texts[0], FIRST + " Yes, but no.") == (FIRST, " Yes, I can.", " Yes, but no.")
    assert prompt_text(spelling(FIRST)) == FIRST
    assert transcript("a\r\nHuman: b") == "a\r\nHuman: b", "not a transcript"
    assert prompt_text("Human: b") == "Human: b", "nobody is to answer"


def test_an_answer_is_the_last_message_and_the_assistants():
    turns = [said("user", "Why?"), said("assistant", "Because."), said("user", "How?")]
    assert exchange(None, [*turns, said("assistant", "Slowly.")]) == (FIRST, "Slowly.")
    with pytest.raises(UnfitError, match="not the assistant's"):
        exchange(None, turns)
    with pytest.raises(UnfitError, match="not the assistant's"):
        exchange("Why?", [])


def test_a_chat_template_is_asked_the_turns_and_a_plain_one_the_text(prompter):
    assert is_dialogue(FIRST) and not is_dialogue("Why?") and not is_dialogue("\n\nHuman: Why?")
    asked = prompter.tokenizer.decode(prompter.prompt_ids(FIRST))
    assert asked == "<user>Why?<end><user>Because.<end><user>How?<end><reply>"
    assert prompter.response_ids(FIRST, " good") == prompter.response_ids(FIRST, "good")
    plain = Prompter(prompter.tokenizer, "{prompt}")
    assert plain.tokenizer.decode(plain.prompt_ids(FIRST)) == FIRST
    assert plain.spell(plain.response_ids(FIRST, " good")) == " good"
    with pytest.raises(UserError, match="has room for one turn"):
        Prompter(prompter.tokenizer, "USER: {prompt} ASSISTANT:").prompt_ids(FIRST)


def test_a_response_is_spelled_behind_its_prompt(prompter):
    plain = Prompter(prompter.tokenizer, "Q: {prompt}\nA:")
    for response in ("good", " good", "\n\ngood", " wonderful day"):
        whole = plain.prompt_ids("Why?") + plain.response_ids("Why?", response, ended=False)
        assert plain.spell(whole) == f"Q: Why?\nA:{response}"
        assert whole == plain.tokenizer(f"Q: Why?\nA:{response}").input_ids
