//! The descriptor: the object that makes a prefix of a store a repository.

use serde::{Deserialize, Serialize};

use crate::error::{FormatError, Result, invalid};
use crate::name::{hex, parse_id};
use crate::{FORMAT_VERSION, SEALED_VERSION, SEGMENT_LEN};

const WHAT: &str = "repository descriptor";

/// What a descriptor's version is the version of.
pub(crate) const VERSIONED: &str = "repository";

/// How a sealed repository's objects are encrypted.
const CIPHER: &str = "aes-256-gcm";

/// A repository's identity and parameters, fixed when it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub id: [u8; 16],
    /// When it was made, in nanoseconds since 1970.
    pub created_ns: u64,
    /// Whether everything but the descriptor and the keys is sealed.
    pub is_sealed: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    epochfs: String,
    version: u16,
    id: String,
    created_ns: u64,
    page_size: u32,
    hash: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cipher: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    segment_size: Option<u32>,
    checksum: String,
}

/// Read first, alone: a newer version may have any other fields.
#[derive(Deserialize)]
struct VersionOnly {
    version: u16,
}

impl Descriptor {
    pub fn encode(&self) -> Vec<u8> {
        let mut text = Text {
            epochfs: "repository".into(),
            version: if self.is_sealed { SEALED_VERSION } else { FORMAT_VERSION },
            id: hex(&self.id),
            created_ns: self.created_ns,
            page_size: crate::PAGE_SIZE as u32,
            hash: "blake3".into(),
            cipher: self.is_sealed.then(|| CIPHER.into()),
            segment_size: self.is_sealed.then_some(SEGMENT_LEN as u32),
            checksum: String::new(),
        };
        text.checksum = format!("{:08x}", crc32c::crc32c(&render(&text)));
        render(&text)
    }

    /// Whether the checksum in these bytes is that of the bytes without its digits. Every version keeps to this, so
    /// that a flipped bit is never taken for a newer version.
    fn proves_itself(bytes: &[u8]) -> bool {
        const FIELD: &[u8] = b"\"checksum\": \"";
        const DIGITS: usize = 8;
        let Some(field) = bytes.windows(FIELD.len()).rposition(|window| window == FIELD) else { return false };
        let (front, rest) = bytes.split_at(field + FIELD.len());
        let Some((digits, back)) = rest.split_at_checked(DIGITS) else { return false };
        let checksum = crc32c::crc32c_append(crc32c::crc32c(front), back);
        digits == format!("{checksum:08x}").as_bytes()
    }

    /// Decodes the descriptor, which must be byte for byte what `encode` makes of it.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        if bytes.len() > 64 << 10 {
            return invalid(WHAT, "it is too long");
        }
        if !Self::proves_itself(bytes) {
            return Err(FormatError::Checksum { what: WHAT });
        }
        const NO_JSON: &str = "it is not the expected JSON";
        let only: VersionOnly = serde_json::from_slice(bytes).or_else(|_| invalid(WHAT, NO_JSON))?;
        if only.version > SEALED_VERSION {
            return Err(FormatError::NewerVersion { what: VERSIONED, found: only.version });
        }
        let text: Text = serde_json::from_slice(bytes).or_else(|_| invalid(WHAT, NO_JSON))?;
        let Some(id) = parse_id(&text.id) else { return invalid(WHAT, "its id is not 32 hexadecimal digits") };
        let descriptor = Self { id, created_ns: text.created_ns, is_sealed: text.version == SEALED_VERSION };
        if descriptor.encode() != bytes {
            return invalid(WHAT, "it has other parameters than this program knows");
        }
        Ok(descriptor)
    }
}

fn render(text: &Text) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(text).expect("plain text and numbers are JSON");
    bytes.push(b'\n');
    bytes
}
