"""Ed25519 keys and signatures: whose bundles may run, whose remote orders are carried out.

A key is trusted for purposes, and none of them implies another. They are said where the device trusts the key: in a line
`purposes: configuration, confirm` above the PEM block of its .pub file (RFC 7468 leaves room for text there).
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_inspector.errors import SignatureError
from edge_inspector.schema import Field, Model

__all__ = [
    "ORDERS",
    "PURPOSES",
    "Ed25519PrivateKey",
    "Purpose",
    "Signature",
    "TrustedKey",
    "create_key",
    "read_private_key",
    "sign",
    "trusted_keys",
    "verify",
]

Purpose = Literal["bundle", "configuration", "confirm", "command", "label"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
BUNDLES: tuple[Purpose, ...] = ("bundle",)
ORDERS: tuple[Purpose, ...] = ("configuration", "confirm", "command", "label")
"""All but bundles: what is ordered over MQTT."""
_SAYS = re.compile(r"^\W*purposes?\s*[:=]", re.IGNORECASE | re.MULTILINE)
_BEGIN, _END = "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----"


class Signature(Model):
    """Who signed, and the signature."""

    algorithm: Literal["ed25519"]
    key_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    signature: str = Field(max_length=128)


@dataclass(frozen=True)
class TrustedKey:
    """A public key, and what it is trusted for. `unmarked`: its file does not say so."""

    public: Ed25519PublicKey
    purposes: frozenset[Purpose]
    unmarked: bool = False


def _key_id(public: Ed25519PublicKey) -> str:
    """The first 16 hex digits of the sha256 of the raw public key."""
    raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def create_key(private: Path, trust: Path, purposes: Collection[Purpose] = BUNDLES) -> str:
    """Make a signing key: the private half at `private` (0600), the public half in the folder `trust`. Returns its id.

    Raises SignatureError if `private` exists: a key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        private.parent.mkdir(parents=True, exist_ok=True)
        trust.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise SignatureError(f"{private}: exists already", hint="choose another name; a key is never overwritten") from error
    except OSError as error:
        raise SignatureError(f"{private}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
    identity = _key_id(key.public_key())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    said = ", ".join(purpose for purpose in PURPOSES if purpose in purposes)
    (trust / f"{private.stem}-{identity}.pub").write_bytes(f"purposes: {said}\n".encode() + public)
    return identity


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a signing key. Raises SignatureError."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise SignatureError(f"{path}: {error.strerror}", hint="make one: edge-inspector keygen") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path}: not a signing key", hint="make one: edge-inspector keygen") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{path}: not an Ed25519 key", hint="make one: edge-inspector keygen")
    return key


def trusted_keys(trust: Path, unmarked: Collection[Purpose] = BUNDLES) -> dict[str, TrustedKey]:
    """The public keys (*.pub) of a trust folder, by id. Raises SignatureError for a file that is not one.

    `unmarked`: the purposes of a key whose file names none.
    """
    keys: dict[str, TrustedKey] = {}
    for path in sorted(trust.glob("*.pub")) if trust.is_dir() else []:
        public, purposes = _public_key(path)
        found = TrustedKey(public, frozenset(purposes or unmarked), unmarked=purposes is None)
        other = keys.get(_key_id(public))
        if other is not None:  # one key in two files is trusted for what both say
            found = TrustedKey(public, found.purposes | other.purposes, found.unmarked or other.unmarked)
        keys[_key_id(public)] = found
    return keys


def _public_key(path: Path) -> tuple[Ed25519PublicKey, tuple[Purpose, ...] | None]:
    """A file of a trust folder: its key, and its purposes where it names some. Raises SignatureError."""
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
        above, begin, rest = text.partition(_BEGIN)
        block, end, below = rest.partition(_END)
        key = serialization.load_pem_public_key(f"{begin}{block}{end}\n".encode())
    except OSError as error:
        raise SignatureError(f"{path}: {error.strerror}", hint="everybody must be able to read a public key") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path}: not a public key", hint="remove it from the trust folder") from error
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{path}: not an Ed25519 key", hint="remove it from the trust folder")
    return key, _purposes(path, above, below)


def _purposes(path: Path, above: str, below: str) -> tuple[Purpose, ...] | None:
    """What the text around a key says of its purposes; None: nothing. A line that is not as it should be is no
    line that is not there: it raises SignatureError.
    """
    lines = [line.strip() for line in f"{above}\n{below}".splitlines() if _SAYS.match(line)]
    if not lines:
        return None
    words = [word.strip() for word in lines[0].removeprefix("purposes:").split(",")]
    found = tuple(purpose for purpose in PURPOSES if purpose in words)
    if len(lines) > 1 or not lines[0].startswith("purposes:") or _SAYS.search(below) or set(words) - set(found):
        raise SignatureError(
            f"{path}: its purposes cannot be told from {lines[0]!r}",
            hint=f"one line above the key: purposes: one or more of {', '.join(PURPOSES)}",
        )
    return found


def sign(data: bytes, key: Ed25519PrivateKey) -> Signature:
    """Sign bytes."""
    signed = base64.b64encode(key.sign(data)).decode()
    return Signature(algorithm="ed25519", key_id=_key_id(key.public_key()), signature=signed)


def verify(signature: Signature, data: bytes, trusted: Mapping[str, TrustedKey], purpose: Purpose = "bundle") -> str:
    """Returns the id of the key that signed these bytes and is trusted for `purpose`. Raises SignatureError."""
    key = trusted.get(signature.key_id)
    if key is None:
        raise SignatureError(
            f"signed by key {signature.key_id}, which is not trusted (trusted: {', '.join(sorted(trusted)) or 'none'})",
            hint="put the signer's .pub file into the trust folder if you trust it",
        )
    try:
        key.public.verify(base64.b64decode(signature.signature, validate=True), data)
    except (InvalidSignature, ValueError) as error:
        raise SignatureError("the signature does not fit the content", hint="it was changed after signing") from error
    if purpose not in key.purposes:
        known = ", ".join(one for one in PURPOSES if one in key.purposes) or "nothing"
        said = "; its .pub file has no line of purposes" if key.unmarked else ""
        raise SignatureError(
            f"signed by key {signature.key_id}, which is not trusted for {purpose}: only for {known}{said}",
            hint=f"where you trust it for that, say so above the key in its .pub file: purposes: {purpose}",
        )
    return signature.key_id
