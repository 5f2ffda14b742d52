//! A store whose objects are encrypted and proven before any other store sees them: above those that keep them, and above a
//! cache on this host's disk, and below everything that reads objects.
//!
//! It promises what its inner store does, and beside it: who has not the key learns no more of an object than its name and
//! its length, and what was not sealed under that name with this key is not read but reported as damage.

mod cipher;
mod read;
#[cfg(test)]
mod tests;
mod writer;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use epochfs_format::{SEGMENT_PLAIN_LEN, is_never_sealed, plain_len, sealed_len};

use self::cipher::{Cipher, ObjectCipher, Sealer};
use self::writer::SealedWriter;
use super::{CacheTotals, Counters, ObjectInfo, ObjectWriter, Put, Reach, Store, Tail, TrafficTotals, check_range};
use crate::error::{Error, Result};
use crate::platform::files::Room;
use crate::platform::keys::Secret;

/// A store of sealed objects.
pub struct SealedStore {
    inner: Arc<dyn Store>,
    cipher: Cipher,
}

impl SealedStore {
    /// Seals what is put into a store, and unseals what is read of it, with a repository's data key.
    pub fn new(inner: Arc<dyn Store>, data_key: &Secret) -> Self {
        Self { inner, cipher: Cipher::new(data_key) }
    }

    fn cipher_of(&self, key: &str) -> Option<ObjectCipher> {
        (!is_never_sealed(key)).then(|| self.cipher.of(key))
    }

    fn sealed(cipher: ObjectCipher, parts: &[&[u8]]) -> Vec<u8> {
        let len = parts.iter().map(|part| part.len() as u64).sum();
        let mut sealer = Sealer::new(cipher, usize::try_from(sealed_len(len)).unwrap_or_default());
        parts.iter().for_each(|part| sealer.push(part));
        sealer.finish()
    }

    fn unproven(&self, key: &str) -> Error {
        let url = self.inner.url();
        Error::damaged(format!(
            "object {key} in {url} is not what was sealed: it is damaged, or was put there by others"
        ))
    }

    fn cut_off(&self, key: &str) -> Error {
        Error::damaged(format!("object {key} in {} is cut off, or was not sealed", self.inner.url()))
    }

    /// A range against the object's length.
    fn check(&self, key: &str, range: &Range<u64>) -> Result<()> {
        let Some(object_len) = self.len(key)? else {
            return Err(Error::not_found(format!("there is no object {key} in {}", self.inner.url())));
        };
        check_range(key, || self.inner.url(), range, object_len)
    }
}

impl Store for SealedStore {
    fn url(&self) -> String {
        self.inner.url()
    }

    fn counters(&self) -> &Counters {
        self.inner.counters()
    }

    fn is_remote(&self) -> bool {
        self.inner.is_remote()
    }

    fn traffic(&self) -> Option<TrafficTotals> {
        self.inner.traffic()
    }

    fn reach(&self) -> Reach {
        self.inner.reach()
    }

    fn cache(&self) -> Option<CacheTotals> {
        self.inner.cache()
    }

    fn distrust(&self, key: &str) -> bool {
        self.inner.distrust(key)
    }

    fn let_go(&self) {
        self.inner.let_go();
    }

    fn be_brief(&self) {
        self.inner.be_brief();
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        match self.cipher_of(key) {
            None => self.inner.get(key),
            Some(cipher) => self.proven(key, || self.read_whole(&cipher, key)),
        }
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let Some(cipher) = self.cipher_of(key) else { return self.inner.get_range(key, range) };
        if range.is_empty() || range.end - range.start > read::UNCHECKED_LEN_MAX || range.end > read::END_MAX {
            self.check(key, &range)?;
        }
        match range.is_empty() {
            true => Ok(Bytes::new()),
            false => self.proven(key, || self.read_range(&cipher, key, &range)),
        }
    }

    fn read_into(&self, key: &str, start: u64, buffer: &mut [u8]) -> Result<()> {
        let Some(cipher) = self.cipher_of(key) else { return self.inner.read_into(key, start, buffer) };
        let range = start..start.saturating_add(buffer.len() as u64);
        if range.is_empty() || range.end > read::END_MAX {
            self.check(key, &range)?;
        }
        match buffer.is_empty() {
            true => Ok(()),
            false => self.proven(key, || self.read_segments(&cipher, key, start, buffer)),
        }
    }

    fn get_damaged(&self, key: &str) -> Result<Bytes> {
        match self.cipher_of(key) {
            None => self.inner.get_damaged(key),
            Some(cipher) => self.read_damaged(&cipher, key),
        }
    }

    fn will_need(&self, key: &str, range: Range<u64>) {
        if is_never_sealed(key) {
            self.inner.will_need(key, range);
        } else if !range.is_empty() && range.end <= read::END_MAX {
            self.inner.will_need(key, read::covering(&range));
        }
    }

    fn get_tail(&self, key: &str, len: u64) -> Result<Tail> {
        match self.cipher_of(key) {
            None => self.inner.get_tail(key, len),
            Some(cipher) => self.proven(key, || self.read_tail(&cipher, key, len)),
        }
    }

    fn len(&self, key: &str) -> Result<Option<u64>> {
        match self.inner.len(key)? {
            Some(len) if !is_never_sealed(key) => plain_len(len).map(Some).ok_or_else(|| self.cut_off(key)),
            len => Ok(len),
        }
    }

    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        match self.cipher_of(key) {
            None => self.inner.put_if_absent(key, parts),
            Some(cipher) => self.inner.put_if_absent(key, &[&Self::sealed(cipher, parts)]),
        }
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<()> {
        match self.cipher_of(key) {
            None => self.inner.replace(key, bytes),
            Some(cipher) => self.inner.replace(key, &Self::sealed(cipher, &[bytes])),
        }
    }

    fn settle(&self, key: &str) -> Result<()> {
        self.inner.settle(key)
    }

    fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>> {
        let inner = self.inner.writer(key)?;
        match self.cipher_of(key) {
            None => Ok(inner),
            Some(cipher) => Ok(Box::new(SealedWriter::new(inner, cipher, key, self.inner.url()))),
        }
    }

    fn list(&self, prefix: &str, after: Option<&str>, each: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.inner.list(prefix, after, &mut |mut info| {
            if !is_never_sealed(&info.key) {
                // Whoever reads one that is cut off finds out.
                info.len =
                    plain_len(info.len).unwrap_or(info.len / SEGMENT_PLAIN_LEN as u64 * SEGMENT_PLAIN_LEN as u64);
            }
            each(info)
        })
    }

    fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        self.inner.list_dirs(prefix)
    }

    fn room(&self) -> Option<Room> {
        self.inner.room()
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.inner.delete(key)
    }
}
