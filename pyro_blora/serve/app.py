"""The application: POST /predict, the page at /, /info, /health, /metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from starlette.exceptions import HTTPException

from ..config.serve_flags import Serving
from ..deploy.answering import Unreadable
from .desk import Asked, Desk, TooLong
from .guard import Guard, Refusal
from .metrics import Metrics
from .page import PAGE, POLICY
from .queue import Full, Queue

_PATHS = ("/", "/predict", "/info", "/health", "/metrics", "/openapi.json")  # others are one to Prometheus
_SOON = 1.0  # seconds after which a full queue may have room


class Question(BaseModel):
    """The body of POST /predict."""

    model_config = ConfigDict(extra="forbid")

    text: Any = Field(None, description="One text: a string; of pairs a list of two, or a table by column.")
    texts: list[Any] | None = Field(None, description="Several of them.")
    draws: StrictBool = Field(False, description="Whether to add what every draw says, and which of them disagree.")

    def all(self) -> list[Any]:
        """Errors: Refusal."""
        if (self.text is None) == (self.texts is None):
            raise Refusal(422, 'give one of "text" and "texts": {"texts": ["a good film"]}')
        return [self.text] if self.texts is None else self.texts


def app_of(desk: Desk, serving: Serving) -> Guard:
    """The ASGI application of a model, within its limits."""
    about = desk.about()
    work = Queue(desk.answer, batch_size=desk.batch_size, wait=serving.wait_ms / 1000, max_texts=serving.max_queue,
                 seen=lambda texts, seconds: metrics.batch(texts, seconds))  # fmt: skip
    metrics = Metrics(model=about["model"], task=about["task"], form=about["form"], waiting=lambda: work.waiting)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(work.run())
        yield
        await work.close()
        await running
        work.stop()

    app = FastAPI(
        title=f"pyro_blora: {about['model']}", docs_url=None, redoc_url=None, lifespan=life,  # those pages load scripts
        exception_handlers={
            Refusal: _refused, RequestValidationError: _invalid, HTTPException: _not_found, Exception: _failed,
        },
    )  # fmt: skip

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"content-security-policy": POLICY})

    @app.get("/info", summary="What the model is, and what a request may have")
    async def info() -> dict[str, Any]:
        limits = {name: getattr(serving, name) for name in ("max_texts", "max_characters", "max_bytes", "rate")}
        return {**about, "limits": limits}

    @app.head("/health", include_in_schema=False)  # as load balancers ask
    @app.get("/health", summary="200 while texts are answered")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if work.is_open else "ending", "waiting": work.waiting},
                            200 if work.is_open else 503)  # fmt: skip

    @app.get("/metrics", summary="For Prometheus")
    async def told() -> Response:
        return Response(metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.post("/predict", summary="Answers, in the order of the texts")
    async def predict(question: Question) -> JSONResponse:
        try:
            texts = desk.read(question.all(), max_texts=serving.max_texts, max_characters=serving.max_characters)
        except TooLong as error:
            raise Refusal(413, str(error)) from None
        except ValueError as error:
            raise Refusal(422, str(error)) from None
        try:
            answers = await asyncio.wait_for(work.answer(Asked(texts, question.draws)), serving.timeout)
        except Unreadable as error:
            raise Refusal(422, str(error)) from None
        except Full:
            raise Refusal(503, "too many texts wait: ask again in a moment", _SOON) from None
        except TimeoutError:
            raise Refusal(504, f"no answer within {serving.timeout:g} s: ask again, or for fewer texts") from None
        metrics.texts(len(answers), sum(row.get("answered") is False for row in answers))
        return JSONResponse({"model": about["model"], "answers": answers})

    return Guard(app, serving, lambda path, code, s: metrics.request(path if path in _PATHS else "other", code, s))


async def _refused(request: Request, error: Any) -> Response:
    return Response(error.body, error.code, error.headers)


async def _invalid(request: Request, error: Any) -> Response:
    """The first fault that pydantic has found, in a sentence."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return await _refused(request, Refusal(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}"))
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    return await _refused(request, Refusal(422, f"{place}: {first['msg']}"))


async def _not_found(request: Request, error: Any) -> Response:
    sentences = {
        404: "there is nothing here: POST texts to /predict, or open / in a browser",
        405: f"{request.method} is not for this place: POST texts to /predict, and GET the others",
    }
    return await _refused(request, Refusal(error.status_code, sentences.get(error.status_code, str(error.detail))))


async def _failed(request: Request, error: Exception) -> Response:
    return await _refused(request, Refusal(500, "this could not be answered: the log of the server says why"))
