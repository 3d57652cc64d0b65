"""Which proxy an attempt calls."""

from dataclasses import replace

import pytest
from factories import task

from millstream.consumers.runner.claims import Claim
from millstream.consumers.runner.proxies import Proxies, ProxyNotClosed
from millstream.schemas.control import LLM, Resources
from millstream.schemas.ids import new_id


async def test_an_attempt_stays_with_one_of_several_proxies_and_its_resources_may_name_others() -> None:
    urls = [f"http://127.0.0.1:{port}" for port in (1, 2, 3)]
    proxies = Proxies(urls, "s")
    claims = [Claim(task(), new_id(), None) for _ in range(100)]
    chosen = [proxies.choose(claim) for claim in claims]
    assert set(chosen) == set(urls)
    assert [proxies.choose(claim) for claim in claims] == chosen
    llm = LLM(model="policy", model_version="r.0.0", endpoints=("http://other:1",))
    pinned = Resources(resources_id="v", experiment_id="", items={"policy": llm})
    assert proxies.choose(replace(claims[0], resources=pinned)) == "http://other:1"
    with pytest.raises(ProxyNotClosed, match=chosen[0]):  # nothing listens: it gets no new attempts for a while
        await proxies.close_attempt(claims[0], chosen[0], proxies.key(claims[0]))
    assert {proxies.choose(claim) for claim in claims} == set(urls) - {chosen[0]}
    await proxies.close()


def test_without_urls_there_is_no_proxy() -> None:
    assert Proxies([], "s").choose(Claim(task(), new_id(), None)) == ""
