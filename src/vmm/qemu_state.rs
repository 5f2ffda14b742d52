//! What the beginning of a device state that QEMU saved says about the machine's RAM.

/// How far into a state its list of RAM is looked for.
pub const LOOKED_AT: usize = 64 << 10;

/// What the RAM section's header has behind its type and number: its name, instance 0 and version 4.
const RAM_SECTION: &[u8] = b"\x03ram\0\0\0\0\0\0\0\x04";

/// Set in the first number of the section, whose other bits are the length of all RAM.
const MEM_SIZE: u64 = 0x04;

/// What a block of RAM has behind its length where its pages lie in the state, each in its place: version 1, and pages of 4 KiB.
const MAPPED: &[u8] = b"\0\0\0\x01\0\0\0\0\0\0\x10\0";

/// The largest block of RAM: that of the memory backend that the machine had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// A restore must give its own backend the same name.
    pub name: String,
    pub len: u64,
    /// Whether its pages are in the state, each in its place.
    pub is_mapped: bool,
}

/// The largest block of RAM of a state. None where this is not the beginning of one.
pub fn ram_block(state: &[u8]) -> Option<RamBlock> {
    if state.get(..8)? != b"QEVM\0\0\0\x03" {
        return None;
    }
    let at = state.windows(RAM_SECTION.len()).position(|window| window == RAM_SECTION)? + RAM_SECTION.len();
    let mut rest = &state[at..];
    let mut number = || {
        let (bytes, behind) = rest.split_first_chunk::<8>()?;
        rest = behind;
        Some(u64::from_be_bytes(*bytes))
    };
    number().filter(|total| total & 0xfff == MEM_SIZE)?;
    // QEMU lists the largest first.
    let (len, behind) = rest.split_first()?;
    let (name, behind) = behind.split_at_checked(usize::from(*len))?;
    let (bytes, behind) = behind.split_first_chunk::<8>()?;
    let name = std::str::from_utf8(name).ok().filter(|name| !name.is_empty() && !name.contains(char::is_control))?;
    let is_mapped = behind.starts_with(MAPPED);
    Some(RamBlock { name: name.to_owned(), len: u64::from_be_bytes(*bytes), is_mapped })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(name: &str, len: u64) -> Vec<u8> {
        state_with(name, len, &[0; 8])
    }

    fn state_with(name: &str, len: u64, behind: &[u8]) -> Vec<u8> {
        let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0".to_vec();
        bytes.extend(b"\x01\0\0\0\x02");
        bytes.extend(RAM_SECTION);
        bytes.extend((len + (128 << 10) + MEM_SIZE).to_be_bytes());
        bytes.push(name.len() as u8);
        bytes.extend(name.as_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(behind);
        bytes
    }

    #[test]
    fn the_backend_of_the_saved_machine_is_found() {
        let block = RamBlock { name: "ram0".to_owned(), len: 1 << 30, is_mapped: false };
        assert_eq!(ram_block(&state("ram0", 1 << 30)), Some(block.clone()));
        let mapped = state_with("ram0", 1 << 30, MAPPED);
        assert_eq!(ram_block(&mapped), Some(RamBlock { is_mapped: true, ..block }));
    }

    #[test]
    fn anything_else_is_none_and_never_a_panic() {
        let whole = state("ram", 1 << 30);
        for len in 0..whole.len() - 8 {
            assert_eq!(ram_block(&whole[..len]), None, "{len}");
        }
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 0xff;
            let _ = ram_block(&flipped);
        }
        assert_eq!(ram_block(b"something else, and long enough to be looked at"), None);
        assert_eq!(ram_block(&state("", 5)), None);
    }
}
