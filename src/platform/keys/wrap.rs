//! A data key encrypted with an operator's key, and back.

use epochfs_format::{SEGMENT_NONCE_LEN, WrappedKey, wrapping_id, wrapping_secret};
use ring::aead::{Aad, LessSafeKey, Nonce, Tag};

use super::Secret;
use crate::platform::random;

impl Secret {
    /// By what this operator's key is known in a repository.
    pub fn id_in(&self, repository: &[u8; 16]) -> [u8; 16] {
        wrapping_id(self.bytes(), repository)
    }

    fn wrapping(&self) -> LessSafeKey {
        Secret::new(wrapping_secret(self.bytes())).cipher()
    }

    /// Encrypts a repository's data key with this operator's key.
    pub fn wrap(&self, data_key: &Self, repository: &[u8; 16], created_ns: u64) -> WrappedKey {
        let id = self.id_in(repository);
        let mut nonce = [0; SEGMENT_NONCE_LEN];
        random::fill(&mut nonce);
        let mut wrapped = *data_key.bytes();
        let claims = Aad::from(WrappedKey::claims(repository, &id, created_ns));
        let tag = self
            .wrapping()
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), claims, &mut wrapped)
            .expect("32 bytes are not too long for the cipher");
        let tag = tag.as_ref().try_into().expect("the tag is as long as the format says");
        WrappedKey { repository: *repository, id, created_ns, nonce, wrapped, tag }
    }

    /// The data key, if it was encrypted with this operator's key and is what it was.
    pub fn unwrap(&self, wrapped: &WrappedKey) -> Option<Self> {
        let mut data_key = wrapped.wrapped;
        let claims = Aad::from(WrappedKey::claims(&wrapped.repository, &wrapped.id, wrapped.created_ns));
        let nonce = Nonce::assume_unique_for_key(wrapped.nonce);
        let tag = Tag::from(wrapped.tag);
        self.wrapping().open_in_place_separate_tag(nonce, claims, tag, &mut data_key, 0..).ok()?;
        Some(Self::new(data_key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_key_is_given_to_its_key_alone_and_noticed_when_changed() {
        let (operators, data_key) = (Secret::random(), Secret::random());
        let wrapped = operators.wrap(&data_key, &[7; 16], 42);
        assert_eq!(operators.unwrap(&wrapped).unwrap(), data_key);
        assert!(Secret::random().unwrap(&wrapped).is_none());
        assert_ne!(operators.id_in(&[7; 16]), operators.id_in(&[8; 16]), "a key is not known again elsewhere");
        let damaged: [fn(&mut WrappedKey); 6] = [
            |key| key.repository[0] ^= 1,
            |key| key.id[0] ^= 1,
            |key| key.created_ns ^= 1,
            |key| key.nonce[11] ^= 1,
            |key| key.wrapped[31] ^= 1,
            |key| key.tag[15] ^= 1,
        ];
        for damage in damaged {
            let mut other = wrapped.clone();
            damage(&mut other);
            assert!(operators.unwrap(&other).is_none(), "{other:?}");
        }
    }
}
