//! Sealing a large object while it is streamed.

use super::cipher::{ObjectCipher, Sealer};
use crate::error::{Error, Kind, Result};
use crate::platform::store::ObjectWriter;

/// So much is sealed before it is handed on.
const HANDED_ON_LEN: usize = 1 << 20;

pub struct SealedWriter {
    inner: Box<dyn ObjectWriter>,
    sealer: Sealer,
    key: String,
    url: String,
    failed: bool,
}

impl SealedWriter {
    pub fn new(inner: Box<dyn ObjectWriter>, cipher: ObjectCipher, key: &str, url: String) -> Self {
        Self { inner, sealer: Sealer::new(cipher, 2 * HANDED_ON_LEN), key: key.to_owned(), url, failed: false }
    }

    fn failed_before(&self) -> Error {
        Error::new(Kind::Io, format!("cannot write {} in {}: an earlier part failed", self.key, self.url))
    }
}

impl ObjectWriter for SealedWriter {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if self.failed {
            return Err(self.failed_before());
        }
        for piece in bytes.chunks(HANDED_ON_LEN) {
            self.sealer.push(piece);
            if let Some(whole) = self.sealer.whole(HANDED_ON_LEN) {
                self.inner.append(whole).inspect_err(|_| self.failed = true)?;
                self.sealer.forget();
            }
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        if self.failed {
            return Err(self.failed_before());
        }
        self.inner.append(&self.sealer.finish())?;
        self.inner.finish()
    }
}
