//! Little-endian fields, read with a bound before every access and before every allocation.

use crate::error::{FormatError, Result, invalid};

/// Takes fields off the front of a byte string.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { rest: bytes, what }
    }

    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(FormatError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(FormatError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(*taken)
    }

    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub fn u24(&mut self) -> Result<u32> {
        let [a, b, c] = self.array()?;
        Ok(u32::from_le_bytes([a, b, c, 0]))
    }

    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub fn i64(&mut self) -> Result<i64> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    /// A 0 or a 1; anything else is damage.
    pub fn flag(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => invalid(self.what, "a flag is neither 0 nor 1"),
        }
    }

    pub fn short_bytes(&mut self) -> Result<&'a [u8]> {
        let len = self.u8()?;
        self.bytes(usize::from(len))
    }

    pub fn medium_bytes(&mut self) -> Result<&'a [u8]> {
        let len = self.u16()?;
        self.bytes(usize::from(len))
    }

    pub fn long_bytes(&mut self) -> Result<&'a [u8]> {
        let len = self.u32()?;
        self.bytes(len as usize)
    }

    pub fn short_text(&mut self) -> Result<&'a str> {
        let what = self.what;
        std::str::from_utf8(self.short_bytes()?).or_else(|_| invalid(what, "a text is not UTF-8"))
    }

    pub fn long_text(&mut self) -> Result<&'a str> {
        let what = self.what;
        std::str::from_utf8(self.long_bytes()?).or_else(|_| invalid(what, "a text is not UTF-8"))
    }

    /// A count of items that take at least `item_len` bytes each: one that cannot fit is refused before
    /// anything is allocated for it.
    pub fn bounded(&self, count: usize, item_len: usize) -> Result<usize> {
        match count.checked_mul(item_len) {
            Some(total) if total <= self.rest.len() => Ok(count),
            _ => Err(FormatError::Truncated { what: self.what }),
        }
    }

    /// Every byte must have been asked for.
    pub fn end(self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { invalid(self.what, "it has bytes past its end") }
    }
}

/// Fields appended to a buffer.
pub(crate) trait Put {
    fn put(&mut self, bytes: &[u8]);

    fn put_u8(&mut self, value: u8) {
        self.put(&[value]);
    }
    fn put_u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }
    fn put_u24(&mut self, value: u32) {
        assert!(value < 1 << 24, "a 24-bit field holds {value}");
        self.put(&value.to_le_bytes()[..3]);
    }
    fn put_u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }
    fn put_u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }
    fn put_i64(&mut self, value: i64) {
        self.put(&value.to_le_bytes());
    }
    fn put_flag(&mut self, value: bool) {
        self.put_u8(u8::from(value));
    }
    fn put_short(&mut self, bytes: &[u8]) {
        self.put_u8(u8::try_from(bytes.len()).expect("names are validated to at most 255 bytes"));
        self.put(bytes);
    }
    fn put_medium(&mut self, bytes: &[u8]) {
        self.put_u16(u16::try_from(bytes.len()).expect("paths are validated to at most 65,535 bytes"));
        self.put(bytes);
    }
    fn put_long(&mut self, bytes: &[u8]) {
        self.put_u32(u32::try_from(bytes.len()).expect("texts are validated to less than 4 GiB"));
        self.put(bytes);
    }
}

impl Put for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// The version of small objects that are not made of blocks.
const VERSION: u16 = 1;

/// The beginning of a small object that is not made of blocks; [`sealed`] puts the end behind it.
pub(crate) fn head(magic: [u8; 8], repository: &[u8; 16]) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    out.put(&magic);
    out.put_u16(VERSION);
    out.put(repository);
    out
}

pub(crate) fn sealed(mut out: Vec<u8>) -> Vec<u8> {
    let check = crc32c::crc32c(&out);
    out.put_u32(check);
    out
}

/// What is behind magic, version and repository, all of which are checked.
pub(crate) fn open<'a>(
    what: &'static str,
    magic: [u8; 8],
    bytes: &'a [u8],
    repository: &[u8; 16],
) -> Result<Reader<'a>> {
    let (body, check) = bytes.split_last_chunk().ok_or(FormatError::Truncated { what })?;
    let mut from = Reader::new(what, body);
    if from.array()? != magic {
        return invalid(what, "it is none");
    }
    if crc32c::crc32c(body) != u32::from_le_bytes(*check) {
        return Err(FormatError::Checksum { what });
    }
    match from.u16()? {
        VERSION => {}
        0 => return invalid(what, "it has no version"),
        found => return Err(FormatError::NewerVersion { what, found }),
    }
    if from.array()? != *repository {
        return Err(FormatError::Mismatch { what, why: "it is of another repository" });
    }
    Ok(from)
}

/// Seven bits a byte, the lowest first; the highest bit says that more follow.
pub(crate) fn put_number(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

pub(crate) fn number(what: &'static str, from: &mut Reader<'_>) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = u64::from(from.u8()?);
        let bits = byte & 0x7f;
        if bits << shift >> shift != bits {
            break;
        }
        value |= bits << shift;
        if byte < 0x80 {
            if byte == 0 && shift > 0 {
                return invalid(what, "a number is longer than it must be");
            }
            return Ok(value);
        }
    }
    invalid(what, "a number is too long")
}
