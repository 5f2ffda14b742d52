//! Sealed objects: how an object's bytes lie in segments that are encrypted and proven one by one, which key each object
//! has, and the objects that keep the repository's data key. What encrypts is not here: this crate says what is encrypted
//! with what.

use crate::error::{Result, invalid};
use crate::name::{DESCRIPTOR_KEY, hex};
use crate::wire::{Put, head, open, sealed};

/// The length of every segment of a sealed object but the last, which is shorter.
pub const SEGMENT_LEN: usize = 16 << 10;
/// What a segment begins with.
pub const SEGMENT_NONCE_LEN: usize = 12;
/// What a segment ends with.
pub const SEGMENT_TAG_LEN: usize = 16;
/// How many bytes a segment takes beside those that it holds.
pub const SEGMENT_OVERHEAD: usize = SEGMENT_NONCE_LEN + SEGMENT_TAG_LEN;
/// How many bytes every segment but the last holds.
pub const SEGMENT_PLAIN_LEN: usize = SEGMENT_LEN - SEGMENT_OVERHEAD;

/// Where the keys to the data key lie.
pub const KEYS_PREFIX: &str = "keys/";
/// Where it lies which of them were removed.
pub const KEY_REMOVALS_PREFIX: &str = "keys/removals/";

/// Whether an object of a sealed repository is stored as it is: whoever has no key yet must read it.
pub fn is_never_sealed(key: &str) -> bool {
    key == DESCRIPTOR_KEY || key.starts_with(KEYS_PREFIX)
}

/// How long an object of so many bytes is once it is sealed.
pub fn sealed_len(plain_len: u64) -> u64 {
    let full = plain_len / SEGMENT_PLAIN_LEN as u64;
    let rest = plain_len % SEGMENT_PLAIN_LEN as u64;
    full * SEGMENT_LEN as u64 + rest + SEGMENT_OVERHEAD as u64
}

/// How many bytes a sealed object of this length holds; none if no sealed object is so long: one was cut off.
pub fn plain_len(sealed_len: u64) -> Option<u64> {
    let full = sealed_len / SEGMENT_LEN as u64;
    let rest = (sealed_len % SEGMENT_LEN as u64).checked_sub(SEGMENT_OVERHEAD as u64)?;
    Some(full * SEGMENT_PLAIN_LEN as u64 + rest)
}

/// What a segment is proven with beside its bytes: which one it is, and whether it is the last.
pub fn segment_claims(index: u64, is_last: bool) -> [u8; 9] {
    let mut claims = [0; 9];
    claims[..8].copy_from_slice(&index.to_le_bytes());
    claims[8] = u8::from(is_last);
    claims
}

/// What the keys of a repository's objects are derived from.
pub fn objects_secret(data_key: &[u8; 32]) -> [u8; 32] {
    blake3::derive_key("EpochFS v1 keys of sealed objects", data_key)
}

/// The key that the object of this name is sealed with.
pub fn object_secret(objects_secret: &[u8; 32], key: &str) -> [u8; 32] {
    *blake3::keyed_hash(objects_secret, key.as_bytes()).as_bytes()
}

/// The key that a data key is wrapped with.
pub fn wrapping_secret(operators_key: &[u8; 32]) -> [u8; 32] {
    blake3::derive_key("EpochFS v1 wrapping of a data key", operators_key)
}

/// By what an operator's key is known in a repository. It says nothing about the key, nor about its use elsewhere.
pub fn wrapping_id(operators_key: &[u8; 32], repository: &[u8; 16]) -> [u8; 16] {
    let secret = blake3::derive_key("EpochFS v1 id of an operator's key", operators_key);
    let hash = blake3::keyed_hash(&secret, repository);
    *hash.as_bytes().first_chunk().expect("a hash is longer than an id")
}

/// The key of the object that holds the data key for the holder of the operator's key with this id.
pub fn wrapped_key_key(id: &[u8; 16]) -> String {
    [KEYS_PREFIX, &hex(id)].concat()
}

/// The key of the removal with this number.
pub fn key_removal_key(number: u64) -> String {
    format!("{KEY_REMOVALS_PREFIX}{number:016}")
}

/// The repository's data key, encrypted with an operator's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedKey {
    pub repository: [u8; 16],
    /// Of the operator's key.
    pub id: [u8; 16],
    /// By the clock of whoever added it, in nanoseconds since 1970. For people only.
    pub created_ns: u64,
    pub nonce: [u8; SEGMENT_NONCE_LEN],
    /// The data key's 32 bytes, encrypted.
    pub wrapped: [u8; 32],
    pub tag: [u8; SEGMENT_TAG_LEN],
}

impl WrappedKey {
    const WHAT: &str = "wrapped key";
    const MAGIC: [u8; 8] = *b"EPOCHKEY";

    /// What the data key is proven with beside its own bytes.
    pub fn claims(repository: &[u8; 16], id: &[u8; 16], created_ns: u64) -> Vec<u8> {
        let mut out = head(Self::MAGIC, repository);
        out.put(id);
        out.put_u64(created_ns);
        out
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Self::claims(&self.repository, &self.id, self.created_ns);
        out.put(&self.nonce);
        out.put(&self.wrapped);
        out.put(&self.tag);
        sealed(out)
    }

    pub fn decode(bytes: &[u8], repository: &[u8; 16], id: &[u8; 16]) -> Result<Self> {
        let mut from = open(Self::WHAT, Self::MAGIC, bytes, repository)?;
        let key = Self {
            repository: *repository,
            id: from.array()?,
            created_ns: from.u64()?,
            nonce: from.array()?,
            wrapped: from.array()?,
            tag: from.array()?,
        };
        from.end()?;
        match key.id == *id {
            true => Ok(key),
            false => invalid(Self::WHAT, "it is for another operator's key"),
        }
    }
}

/// That an operator's key is removed. Removals are numbered without gaps: creating the next one decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRemoval {
    pub repository: [u8; 16],
    pub number: u64,
    /// Of the operator's key that opens the repository no longer.
    pub id: [u8; 16],
    /// Random, new for each removal: who reads its own back has created it.
    pub writer: [u8; 16],
}

impl KeyRemoval {
    const WHAT: &str = "removal of a key";
    const MAGIC: [u8; 8] = *b"EPOCHKRM";

    pub fn encode(&self) -> Vec<u8> {
        let mut out = head(Self::MAGIC, &self.repository);
        out.put_u64(self.number);
        out.put(&self.id);
        out.put(&self.writer);
        sealed(out)
    }

    pub fn decode(bytes: &[u8], repository: &[u8; 16], number: u64) -> Result<Self> {
        let mut from = open(Self::WHAT, Self::MAGIC, bytes, repository)?;
        let removal = Self { repository: *repository, number: from.u64()?, id: from.array()?, writer: from.array()? };
        from.end()?;
        match removal.number == number {
            true => Ok(removal),
            false => invalid(Self::WHAT, "it has another number"),
        }
    }
}
