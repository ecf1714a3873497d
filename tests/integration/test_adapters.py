"""LoRA adapters through the whole service: addressed by model name, listed, read on demand."""

import openai
import pytest

from tests.integration.conftest import make_demo_adapter


def greedy(client, model, **fields):
    return client.completions.create(model=model, prompt="What is 2 + 3?", temperature=0, max_tokens=8, **fields)


def test_an_adapter_is_a_model_of_its_own(client):
    base, adapted = greedy(client, "demo", logprobs=0), greedy(client, "demo:loud", logprobs=0)
    assert (base.model, adapted.model) == ("demo", "demo:loud")
    assert base.choices[0].logprobs.token_logprobs != adapted.choices[0].logprobs.token_logprobs
    again = greedy(client, "demo", logprobs=0)
    assert again.choices[0].text == base.choices[0].text
    message = {"role": "user", "content": "Hello"}
    chat = client.chat.completions.create(model="demo:loud", messages=[message], max_tokens=4)
    assert chat.model == "demo:loud" and chat.usage.completion_tokens > 0


def test_adapters_are_listed_with_their_parent(client):
    cards = {card.id: card.model_extra["parent"] for card in client.models.list()}
    assert cards["demo"] is None and cards["demo:loud"] == "demo"
    assert client.models.retrieve("demo:loud").id == "demo:loud"


def test_one_that_appears_while_the_service_runs_is_found(client, adapter_folder):
    with pytest.raises(openai.NotFoundError):
        greedy(client, "demo:later")
    make_demo_adapter(adapter_folder / "later", seed=2)
    assert greedy(client, "demo:later").model == "demo:later"


@pytest.mark.parametrize("name", ["none", "../loud", "/etc", "", "a" * 65, "loud:loud"])
def test_unknown_ones_are_not_found(client, name):
    with pytest.raises(openai.NotFoundError) as caught:
        greedy(client, f"demo:{name}")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert "/" not in caught.value.message.replace(f"demo:{name}", "")
    if name:
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(f"demo:{name}")
