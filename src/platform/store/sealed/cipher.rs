//! Segments: each is encrypted and proven with its object's key, its number, and whether it is the last.

use epochfs_format::{
    SEGMENT_LEN, SEGMENT_NONCE_LEN, SEGMENT_PLAIN_LEN, SEGMENT_TAG_LEN, object_secret, objects_secret, segment_claims,
};
use ring::aead::{Aad, LessSafeKey, Nonce, Tag};

use crate::platform::keys::Secret;
use crate::platform::random;

/// So many segments' nonces are drawn at once.
const NONCES: usize = 64;

/// What the keys of all objects are made of.
pub struct Cipher {
    secret: Secret,
}

impl Cipher {
    pub fn new(data_key: &Secret) -> Self {
        Self { secret: Secret::new(objects_secret(data_key.bytes())) }
    }

    /// That of one object.
    pub fn of(&self, key: &str) -> ObjectCipher {
        ObjectCipher(Secret::new(object_secret(self.secret.bytes(), key)).cipher())
    }
}

/// A segment that is not what was sealed, or not where it was.
#[derive(Debug)]
pub struct Unproven;

pub struct ObjectCipher(LessSafeKey);

impl ObjectCipher {
    /// Encrypts a segment, of which the nonce and the bytes behind it are there, and appends the tag.
    fn seal(&self, index: u64, is_last: bool, segment: &mut Vec<u8>, at: usize) {
        let (nonce, plain) = segment[at..].split_at_mut(SEGMENT_NONCE_LEN);
        let nonce = Nonce::try_assume_unique_for_key(nonce).expect("the nonce is as long as the cipher wants it");
        let claims = Aad::from(segment_claims(index, is_last));
        let tag = self.0.seal_in_place_separate_tag(nonce, claims, plain).expect("a segment is not too long");
        segment.extend_from_slice(tag.as_ref());
    }

    /// Decrypts a segment in place, and returns what it holds. One that is shorter than others is the last.
    pub fn open<'a>(&self, index: u64, segment: &'a mut [u8]) -> Result<&'a mut [u8], Unproven> {
        let is_last = segment.len() < SEGMENT_LEN;
        let (nonce, rest) = segment.split_at_mut_checked(SEGMENT_NONCE_LEN).ok_or(Unproven)?;
        let at = rest.len().checked_sub(SEGMENT_TAG_LEN).ok_or(Unproven)?;
        let (plain, tag) = rest.split_at_mut(at);
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| Unproven)?;
        let tag = Tag::try_from(&*tag).map_err(|_| Unproven)?;
        let claims = Aad::from(segment_claims(index, is_last));
        self.0.open_in_place_separate_tag(nonce, claims, tag, plain, 0..).map_err(|_| Unproven)
    }
}

/// Seals an object from its beginning to its end. What is sealed can be taken away in between.
pub struct Sealer {
    cipher: ObjectCipher,
    sealed: Vec<u8>,
    /// Where the segment begins that is being filled.
    segment: usize,
    index: u64,
    nonces: [u8; NONCES * SEGMENT_NONCE_LEN],
}

impl Sealer {
    pub fn new(cipher: ObjectCipher, sealed_len: usize) -> Self {
        let nonces = [0; NONCES * SEGMENT_NONCE_LEN];
        let mut sealer = Self { cipher, sealed: Vec::with_capacity(sealed_len), segment: 0, index: 0, nonces };
        sealer.begin();
        sealer
    }

    fn begin(&mut self) {
        let nonce = (self.index % NONCES as u64) as usize;
        if nonce == 0 {
            random::fill(&mut self.nonces);
        }
        self.segment = self.sealed.len();
        self.sealed.extend_from_slice(&self.nonces[nonce * SEGMENT_NONCE_LEN..][..SEGMENT_NONCE_LEN]);
    }

    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = SEGMENT_NONCE_LEN + SEGMENT_PLAIN_LEN - (self.sealed.len() - self.segment);
            let (taken, rest) = bytes.split_at(bytes.len().min(room));
            self.sealed.extend_from_slice(taken);
            bytes = rest;
            // A segment that is full is not the last: an empty one comes behind it, if nothing else does.
            if taken.len() == room {
                self.cipher.seal(self.index, false, &mut self.sealed, self.segment);
                self.index += 1;
                self.begin();
            }
        }
    }

    /// The segments that are whole, if they are so many bytes. They are forgotten with [`Sealer::forget`].
    pub fn whole(&self, len_min: usize) -> Option<&[u8]> {
        (self.segment >= len_min).then(|| &self.sealed[..self.segment])
    }

    pub fn forget(&mut self) {
        self.sealed.drain(..self.segment);
        self.segment = 0;
    }

    /// The rest.
    pub fn finish(mut self) -> Vec<u8> {
        self.cipher.seal(self.index, true, &mut self.sealed, self.segment);
        self.sealed
    }
}
