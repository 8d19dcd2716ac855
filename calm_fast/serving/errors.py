"""Errors as the OpenAI protocol tells them: {"error": {"message", "type", "code"}}, whoever raises them."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


def tell_errors(app: Any) -> None:
    """Make `app` answer in this form for its own errors, unknown paths, bodies that are no JSON, and faults of ours."""
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _no_object)
    app.add_exception_handler(Exception, _failed)  # the traceback is logged


def _reply(status: int, message: str, headers: Any = None) -> Any:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "code": status}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def _refused(_: Any, problem: Any) -> Any:
    return _reply(problem.status_code, str(problem.detail), getattr(problem, "headers", None))


async def _no_object(_: Any, problem: Any) -> Any:
    found = problem.errors()[0]
    why = found.get("ctx", {}).get("error") or found["msg"]
    return _reply(400, f"the body must be a JSON object, sent as application/json: {why}")


async def _failed(_: Any, problem: Exception) -> Any:
    return _reply(500, f"{type(problem).__name__}: {problem}")
