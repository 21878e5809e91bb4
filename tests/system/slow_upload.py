"""An upload that stands still in the middle, for everything that may happen to it there."""

from tests.system.clients import RawClient
from tests.system.site import Site, Vdi


class SlowUpload:
    """An upload that stands still in the middle until it is told to go on."""

    def __init__(self, site: Site, vdi: Vdi, content: bytes, *, scheme: str = "http") -> None:
        self.site = site
        self.content = content
        self.task = site.create_task()
        authority = site.gateway.ca_file if scheme == "https" else None
        self.client = RawClient(site.import_url(vdi, scheme=scheme, task_id=self.task), authority)
        self.client.head(f"Content-Length: {len(content)}")
        status, self.headers = self.client.answer_head()
        assert status == 200
        self.client.send(content[: len(content) // 2])
        site.wait_for_progress(self.task, 0.4)

    def __enter__(self) -> "SlowUpload":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.socket.close()

    def finish(self) -> None:
        self.client.send(self.content[len(self.content) // 2 :])
        body, complete = self.client.answer_body(self.headers)
        assert complete, body
        assert self.site.task(self.task)["status"] == "success"
