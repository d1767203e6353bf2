"""What pages may be asked, and what actions are told."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Scope = Literal["read", "write", "admin"]
Visibility = Literal["public", "private"]
Words = Annotated[str, Field(max_length=200)]


class Query(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a zero byte is no text")
        return value


class Nothing(Query):
    """No parameters."""


class Environments(Query):
    words: Words = Field(default="", description="all of them are in its name, owner, tags, summary or README")
    tag: str = Field(default="", max_length=30)
    owner: str = Field(default="", max_length=40)
    page: int = Field(default=1, ge=1, le=10_000)
    limit: int = Field(default=50, ge=1, le=200)


class Environment(Query):
    version: str = Field(default="", max_length=100, description="which is shown; empty: the newest")


class Source(Query):
    file: str = Field(
        default="", max_length=255, description="a file of the environment; empty: one of the newest version"
    )
    path: str = Field(default="", max_length=512, description="a member of it; empty: the list of members")


class Audit(Query):
    subject: str = Field(default="", max_length=200, description="only what begins so")
    before: int = Field(default=0, ge=0, lt=2**31, description="only older rows; an answer names the next")
    limit: int = Field(default=100, ge=1, le=500)


# --- bodies of actions


class NewOwner(Query):
    name: str = Field(max_length=40)
    kind: Literal["person", "organisation"] = "organisation"


class NewToken(Query):
    """For whoever asks; an administrator of the hub may name another person."""

    name: str = Field(default="", max_length=100, description="to know it by")
    scope: Scope = "write"
    days: float = Field(default=90, gt=0, le=3660, description="until it expires")
    only: str = Field(default="", max_length=150, description="restricts it to OWNER or OWNER/ENVIRONMENT")
    person: str = Field(default="", max_length=40)


class Login(Query):
    token: str = Field(max_length=200)


class NewEnvironment(Query):
    name: str = Field(max_length=100)
    visibility: Visibility = "public"
    near: bool = Field(default=False, description="an administrator of the hub lets it be called almost as another")


class SetVisibility(Query):
    visibility: Visibility


class Yank(Query):
    reason: str = Field(default="", max_length=500)


class SetMember(Query):
    role: Scope


class AddMember(SetMember):
    person: str = Field(max_length=40)
