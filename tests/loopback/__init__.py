"""Modal without the cloud: the real client and the real container entry point, around a control plane on 127.0.0.1.

```python
from tests import loopback

plane, client = loopback.plane, loopback.client  # pytest finds fixtures among a module's names


@pytest.mark.asyncio
async def test_one_call(plane, client):
    app = modal.App("one")
    echo = app.function(image=modal.Image.debian_slim())(loopback.job("echo"))
    async with app.run.aio():
        assert await echo.remote.aio(b"abc") == b"abc"
    assert plane.calls["FunctionMap"] == 1
```
"""

from tests.loopback.fixtures import client, job, load, nothing_left, one_app, plane
from tests.loopback.plane import Plane

__all__ = ["Plane", "client", "job", "load", "nothing_left", "one_app", "plane"]
