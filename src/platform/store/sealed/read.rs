//! Reading: the segments that cover what is wanted, each proven and decrypted where it lies.

use std::cell::RefCell;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use epochfs_format::{SEGMENT_LEN, SEGMENT_OVERHEAD, SEGMENT_PLAIN_LEN, plain_len, sealed_len};

use super::cipher::{ObjectCipher, Unproven};
use super::{SealedStore, Tail};
use crate::error::{Error, Result};

/// A range that is longer is looked at against the object's length, before anything is allocated for it.
pub const UNCHECKED_LEN_MAX: u64 = 16 << 20;

/// No object ends behind this.
pub const END_MAX: u64 = 1 << 48;

/// What a thread keeps for the next read.
const KEPT_LEN_MAX: usize = 8 << 20;

thread_local! {
    static SEGMENTS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Why there is nothing to return.
pub enum Why {
    Unproven,
    Other(Error),
}

impl From<Unproven> for Why {
    fn from(Unproven: Unproven) -> Self {
        Self::Unproven
    }
}

impl From<Error> for Why {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

type Read<T> = std::result::Result<T, Why>;

/// The number of the segment that holds a byte.
fn segment_of(at: u64) -> u64 {
    at / SEGMENT_PLAIN_LEN as u64
}

/// Where the segments lie that hold these bytes, of which there is one at least; the last may be shorter.
pub fn covering(range: &Range<u64>) -> Range<u64> {
    let segment_len = SEGMENT_LEN as u64;
    segment_of(range.start) * segment_len..(segment_of(range.end - 1) + 1) * segment_len
}

/// Decrypts segments where they lie, and gives each one's bytes and where in the object they are to `take`.
fn open_each(
    cipher: &ObjectCipher,
    first: u64,
    segments: &mut [u8],
    mut take: impl FnMut(u64, &[u8]),
) -> std::result::Result<(), Unproven> {
    for (index, segment) in (first..).zip(segments.chunks_mut(SEGMENT_LEN)) {
        take(index * SEGMENT_PLAIN_LEN as u64, cipher.open(index, segment)?);
    }
    Ok(())
}

/// Decrypts segments and moves what they hold together, so that it is what is left.
fn open_all(cipher: &ObjectCipher, first: u64, segments: &mut BytesMut) -> std::result::Result<(), Unproven> {
    let (mut at, mut end) = (0, 0);
    for index in first.. {
        let len = SEGMENT_LEN.min(segments.len() - at);
        if len == 0 {
            break;
        }
        let plain = cipher.open(index, &mut segments[at..at + len])?.len();
        let from = at + epochfs_format::SEGMENT_NONCE_LEN;
        segments.copy_within(from..from + plain, end);
        (at, end) = (at + len, end + plain);
    }
    segments.truncate(end);
    Ok(())
}

/// Bytes that can be changed: where nobody else has them, those themselves.
fn own(bytes: Bytes) -> BytesMut {
    bytes.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]))
}

impl SealedStore {
    /// Reads once more what does not prove itself, if it may have been right elsewhere.
    pub(super) fn proven<T>(&self, key: &str, mut read: impl FnMut() -> Read<T>) -> Result<T> {
        let mut result = read();
        if matches!(result, Err(Why::Unproven)) && self.inner.distrust(key) {
            result = read();
        }
        result.map_err(|why| match why {
            Why::Unproven => self.unproven(key),
            Why::Other(error) => error,
        })
    }

    /// The object ended before the range did.
    fn too_short(&self, key: &str, range: &Range<u64>) -> Error {
        self.check(key, range).err().unwrap_or_else(|| self.cut_off(key))
    }

    pub(super) fn read_whole(&self, cipher: &ObjectCipher, key: &str) -> Read<Bytes> {
        let mut segments = own(self.inner.get(key)?);
        if plain_len(segments.len() as u64).is_none() {
            return Err(Why::Unproven);
        }
        open_all(cipher, 0, &mut segments)?;
        Ok(segments.freeze())
    }

    /// A range that is not empty.
    pub(super) fn read_range(&self, cipher: &ObjectCipher, key: &str, range: &Range<u64>) -> Read<Bytes> {
        let first = segment_of(range.start);
        let mut plain = own(self.inner.get_within(key, covering(range))?);
        open_all(cipher, first, &mut plain)?;
        let from = range.start - first * SEGMENT_PLAIN_LEN as u64;
        let len = range.end - range.start;
        if (plain.len() as u64) < from + len {
            return Err(Why::Other(self.too_short(key, range)));
        }
        Ok(plain.freeze().slice(from as usize..(from + len) as usize))
    }

    /// The same into a buffer.
    pub(super) fn read_segments(&self, cipher: &ObjectCipher, key: &str, start: u64, buffer: &mut [u8]) -> Read<()> {
        let range = start..start + buffer.len() as u64;
        let covering = covering(&range);
        SEGMENTS.with_borrow_mut(|segments| {
            let len = usize::try_from(covering.end - covering.start).expect("it is not much longer than the buffer");
            if segments.len() < len {
                segments.resize(len, 0);
            }
            let got = self.inner.read_within(key, covering.start, &mut segments[..len])?;
            let mut end = 0;
            open_each(cipher, segment_of(start), &mut segments[..got], |at, plain| {
                end = at + plain.len() as u64;
                let (from, to) = (range.start.max(at), range.end.min(end));
                if from < to {
                    let plain = &plain[(from - at) as usize..(to - at) as usize];
                    buffer[(from - start) as usize..][..plain.len()].copy_from_slice(plain);
                }
            })?;
            if segments.len() > KEPT_LEN_MAX {
                *segments = Vec::new();
            }
            if end < range.end { Err(Why::Other(self.too_short(key, &range))) } else { Ok(()) }
        })
    }

    pub(super) fn read_tail(&self, cipher: &ObjectCipher, key: &str, len: u64) -> Read<Tail> {
        // The bytes may begin anywhere in a segment, of which all is needed.
        let most = sealed_len(len.min(END_MAX) + SEGMENT_PLAIN_LEN as u64 - 1);
        let tail = self.inner.get_tail(key, most)?;
        let object_len = plain_len(tail.object_len).ok_or(Why::Unproven)?;
        let begin = object_len - len.min(object_len);
        // The last segment is there in any case, and proves how long the object is.
        let first = segment_of(begin);
        let skipped = tail.object_len.checked_sub(tail.bytes.len() as u64).ok_or(Why::Unproven)?;
        let from = (first * SEGMENT_LEN as u64).checked_sub(skipped).ok_or(Why::Unproven)?;
        let mut plain = own(tail.bytes.slice(from.min(tail.bytes.len() as u64) as usize..));
        open_all(cipher, first, &mut plain)?;
        let from = first * SEGMENT_PLAIN_LEN as u64;
        if from + plain.len() as u64 != object_len {
            return Err(Why::Unproven);
        }
        Ok(Tail { bytes: plain.freeze().slice((begin - from) as usize..), object_len })
    }

    /// What proves itself; zeros where something does not.
    pub(super) fn read_damaged(&self, cipher: &ObjectCipher, key: &str) -> Result<Bytes> {
        let sealed = self.inner.get_damaged(key)?;
        let mut plain = BytesMut::with_capacity(sealed.len());
        let mut segment = Vec::with_capacity(SEGMENT_LEN);
        for (index, bytes) in (0..).zip(sealed.chunks(SEGMENT_LEN)) {
            segment.clear();
            segment.extend_from_slice(bytes);
            match cipher.open(index, &mut segment) {
                Ok(opened) => plain.extend_from_slice(opened),
                Err(Unproven) => plain.resize(plain.len() + bytes.len().saturating_sub(SEGMENT_OVERHEAD), 0),
            }
        }
        Ok(plain.freeze())
    }
}
