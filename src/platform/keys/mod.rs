//! Keys that encrypt: the operator's, which are found where the operator says (`source.rs`), and a repository's data key,
//! which is stored wrapped with them. None of them is printed or logged, and each is overwritten when it is let go of.

mod source;
mod text;
mod wrap;

use std::fmt;
use std::hint::black_box;

pub use source::{KEY_COMMAND_VARIABLE, KEY_FILE_VARIABLE, KEY_VARIABLE, KeySettings, read_keys};

use epochfs_format::hex;
use ring::aead::{AES_256_GCM, LessSafeKey, UnboundKey};

use crate::platform::random;

/// 256 bits that nobody else knows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

impl Secret {
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// A new one from the kernel.
    pub fn random() -> Self {
        let mut secret = Self([0; 32]);
        random::fill(&mut secret.0);
        secret
    }

    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// In hexadecimal digits: for whoever writes it where it is to be kept.
    pub fn to_text(&self) -> String {
        hex(&self.0)
    }

    /// The cipher of which it is the key.
    pub fn cipher(&self) -> LessSafeKey {
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &self.0).expect("the key is as long as the cipher wants it"))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.fill(0);
        // So that the compiler does not leave out what nobody seems to read.
        black_box(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_shows_nothing_of_itself() {
        let secret = Secret::random();
        assert_eq!(format!("{secret:?}"), "Secret");
        assert_ne!(secret, Secret::random());
        assert_eq!(Secret::new([0xab; 32]).to_text(), "ab".repeat(32));
    }
}
