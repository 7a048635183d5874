"""Ed25519 keys and signatures: whose bundles may run, whose remote orders are carried out."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_inspector.errors import SignatureError
from edge_inspector.schema import Field, Model

__all__ = ["Ed25519PrivateKey", "Signature", "create_key", "read_private_key", "sign", "trusted_keys", "verify"]


class Signature(Model):
    """Who signed, and the signature."""

    algorithm: Literal["ed25519"]
    key_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    signature: str = Field(max_length=128)


def _key_id(public: Ed25519PublicKey) -> str:
    """The first 16 hex digits of the sha256 of the raw public key."""
    raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def create_key(private: Path, trust: Path) -> str:
    """Make a signing key: the private half at `private` (0600), the public half in the folder `trust`. Returns its id.

    Raises SignatureError if `private` exists: a key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise SignatureError(f"{private}: exists already", hint="choose another name; a key is never overwritten") from error
    except OSError as error:
        raise SignatureError(f"{private}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
    identity = _key_id(key.public_key())
    trust.mkdir(parents=True, exist_ok=True)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (trust / f"{private.stem}-{identity}.pub").write_bytes(public)
    return identity


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a signing key. Raises SignatureError."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path}: not a signing key: {error}", hint="make one: edge-inspector keygen") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{path}: not an Ed25519 key", hint="make one: edge-inspector keygen")
    return key


def trusted_keys(trust: Path) -> dict[str, Ed25519PublicKey]:
    """The public keys (*.pub) of a trust folder, by id. Raises SignatureError for a file that is not one."""
    keys = {}
    for path in sorted(trust.glob("*.pub")) if trust.is_dir() else []:
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise SignatureError(f"{path}: not a public key: {error}", hint="remove it from the trust folder") from error
        if not isinstance(key, Ed25519PublicKey):
            raise SignatureError(f"{path}: not an Ed25519 key", hint="remove it from the trust folder")
        keys[_key_id(key)] = key
    return keys


def sign(data: bytes, key: Ed25519PrivateKey) -> Signature:
    """Sign bytes."""
    signed = base64.b64encode(key.sign(data)).decode()
    return Signature(algorithm="ed25519", key_id=_key_id(key.public_key()), signature=signed)


def verify(signature: Signature, data: bytes, trusted: dict[str, Ed25519PublicKey]) -> str:
    """Returns the id of the trusted key that signed these bytes. Raises SignatureError."""
    key = trusted.get(signature.key_id)
    if key is None:
        raise SignatureError(
            f"signed by key {signature.key_id}, which is not trusted (trusted: {', '.join(sorted(trusted)) or 'none'})",
            hint="put the signer's .pub file into the trust folder if you trust it",
        )
    try:
        key.verify(base64.b64decode(signature.signature, validate=True), data)
    except (InvalidSignature, ValueError) as error:
        raise SignatureError("the signature does not fit the content", hint="it was changed after signing") from error
    return signature.key_id
