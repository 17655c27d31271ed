"""What stands before every route: the key, how long and how large a request may be, and how slowly an answer may be read."""

import asyncio
import hmac
import json

OPEN = ("/healthz", "/ready")  # without a key
MOST_BODY = 64 * 1024  # bytes
BODY_SECONDS, READ_SECONDS = 10.0, 30.0  # for a body to come, for a piece of the answer to be taken


class Door:
    """ASGI middleware: answers 401 without the key, 413 and 408 for bodies too large or slow, and counts answers."""

    def __init__(self, app, key: str, figures):
        self.app, self.key, self.figures = app, key.encode(), figures

    async def __call__(self, scope, receive, send):
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def count(message):
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "")  # a path that nobody has would be a figure of its own
                self.figures.answers.labels(route, str(message["status"])).inc()
            async with asyncio.timeout(READ_SECONDS):
                await send(message)

        body, large = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    large += len(message.get("body", b""))
                    if large <= MOST_BODY:  # the rest is read and forgotten: a client that still sends hears no answer
                        body.append(message.get("body", b""))
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            return await self._answer(count, 408, f"the body did not come within {BODY_SECONDS:.0f} s")
        if self.key and scope["path"] not in OPEN and not self._knows(scope):
            return await self._answer(count, 401, "this server wants its key in the header Authorization: Bearer ...")
        if large > MOST_BODY:
            return await self._answer(count, 413, f"the body has {large} bytes; allowed are {MOST_BODY}")
        waiting = [{"type": "http.request", "body": b"".join(body), "more_body": False}]

        async def replay():
            return waiting.pop() if waiting else await receive()

        return await self.app(scope, replay, count)

    def _knows(self, scope):
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given.removeprefix(b"Bearer "), self.key) and given.startswith(b"Bearer ")

    async def _answer(self, send, status, message):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": error}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        headers += [(b"www-authenticate", b"Bearer")] * (status == 401)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
