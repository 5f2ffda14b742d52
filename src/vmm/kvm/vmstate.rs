//! The stream `vmstate`: everything of a VM that is not its memory, as bytes.
//!
//! ```text
//! 0   8  "EPFSVMST"
//! 8   2  version, 1
//! 10  2  architecture, 1: x86-64, as KVM has it
//! 12  4  number of sections
//! 16     sections, each:
//!          0  2  kind
//!          2  2  processor, or 0xffff: the VM itself
//!          4  4  length of the content
//!          8     content, and zeros up to a multiple of 8
//! end 4  CRC-32C of everything before
//! ```
//!
//! Numbers are little-endian. A section holds a structure of KVM's interface as the kernel lays it out, which is fixed for an
//! architecture, or an array of them; `shape` and `serial` are ours. Sections are in order of processor, the VM first, and
//! kind; none comes twice. A kind or version that is not known is refused: what it says could not be left out.

use std::collections::BTreeMap;

use crate::error::{Error, Kind, Result};

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Length of the memory, beginning of its hole (each u64), number of processors (u32).
    Shape,
    /// `kvm_clock_data`
    Clock,
    /// `kvm_irqchip` of the first and second interrupt controller, and of the one for input and output.
    FirstPic,
    SecondPic,
    IoApic,
    /// `kvm_pit_state2`
    Timer,
    /// The registers of the serial port.
    Serial,
    /// `kvm_cpuid_entry2`, several
    CpuId,
    /// u32
    TscKhz,
    /// `kvm_mp_state`
    MpState,
    /// `kvm_regs`
    Registers,
    /// `kvm_sregs`
    SpecialRegisters,
    /// `kvm_xsave`, with as much behind it as the host has
    Vectors,
    /// `kvm_xcrs`
    ControlRegisters,
    /// `kvm_debugregs`
    DebugRegisters,
    /// `kvm_lapic_state`
    LocalApic,
    /// `kvm_msr_entry`, several
    ModelRegisters,
    /// `kvm_vcpu_events`
    Events,
}

const PARTS: [(u16, Part); 18] = [
    (1, Part::Shape),
    (2, Part::Clock),
    (3, Part::FirstPic),
    (4, Part::SecondPic),
    (5, Part::IoApic),
    (6, Part::Timer),
    (7, Part::Serial),
    (16, Part::CpuId),
    (17, Part::TscKhz),
    (18, Part::MpState),
    (19, Part::Registers),
    (20, Part::SpecialRegisters),
    (21, Part::Vectors),
    (22, Part::ControlRegisters),
    (23, Part::DebugRegisters),
    (24, Part::LocalApic),
    (25, Part::ModelRegisters),
    (26, Part::Events),
];

impl Part {
    fn number(self) -> u16 {
        PARTS.iter().find(|(_, part)| *part == self).expect("every part has a number").0
    }

    /// Whether it is a processor's, and not the VM's.
    fn is_of_processor(self) -> bool {
        self.number() >= 16
    }
}

const MAGIC: &[u8; 8] = b"EPFSVMST";
const VERSION: u16 = 1;
const ARCHITECTURE: u16 = 1;
const HEADER_LEN: usize = 16;
const MACHINE: u16 = u16::MAX;
const LEN_MAX: usize = 64 << 20;

/// The sections of a VM's state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmState {
    sections: BTreeMap<(u16, Part), Vec<u8>>,
}

/// The VM first.
fn key(processor: Option<u16>, part: Part) -> (u16, Part) {
    (processor.map_or(0, |number| number + 1), part)
}

impl VmState {
    pub fn put(&mut self, processor: Option<u16>, part: Part, content: Vec<u8>) {
        assert_eq!(processor.is_some(), part.is_of_processor(), "{part:?} is in its place");
        self.sections.insert(key(processor, part), content);
    }

    pub fn get(&self, processor: Option<u16>, part: Part) -> Result<&[u8]> {
        self.find(processor, part).ok_or_else(|| match processor {
            None => Error::damaged(format!("the state of the VM has no {part:?}")),
            Some(number) => Error::damaged(format!("the state of processor {number} has no {part:?}")),
        })
    }

    pub fn find(&self, processor: Option<u16>, part: Part) -> Option<&[u8]> {
        self.sections.get(&key(processor, part)).map(Vec::as_slice)
    }

    /// Takes over all sections of another.
    pub fn extend(&mut self, other: Self) {
        self.sections.extend(other.sections);
    }

    pub fn encode(&self) -> Vec<u8> {
        let len: usize = self.sections.values().map(|content| 8 + content.len().next_multiple_of(8)).sum();
        let mut bytes = Vec::with_capacity(HEADER_LEN + len + 4);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&ARCHITECTURE.to_le_bytes());
        bytes.extend_from_slice(&(self.sections.len() as u32).to_le_bytes());
        for ((order, part), content) in &self.sections {
            bytes.extend_from_slice(&part.number().to_le_bytes());
            bytes.extend_from_slice(&order.checked_sub(1).unwrap_or(MACHINE).to_le_bytes());
            bytes.extend_from_slice(&(content.len() as u32).to_le_bytes());
            bytes.extend_from_slice(content);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        let sum = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Refuses what is not exactly what `encode` makes.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let damaged = |why: &str| Error::damaged(format!("the state of the VM is damaged: {why}"));
        if bytes.len() < HEADER_LEN + 4 || &bytes[..8] != MAGIC {
            return Err(Error::new(Kind::Unsupported, "this is no state of a VM that `epochfs run` made")
                .hint("a VM of another monitor is restored with `epochfs restore`"));
        }
        if bytes.len() > LEN_MAX {
            return Err(damaged("it is too long"));
        }
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        if half(8) != VERSION || half(10) != ARCHITECTURE {
            return Err(Error::new(
                Kind::Unsupported,
                format!("the state of the VM has version {} and architecture {}", half(8), half(10)),
            )
            .hint("use a newer epochfs, on a host of that architecture"));
        }
        let end = bytes.len() - 4;
        if crc32c::crc32c(&bytes[..end]) != word(end) {
            return Err(damaged("its checksum is wrong"));
        }
        let (mut at, mut state, mut last) = (HEADER_LEN, Self::default(), None);
        for _ in 0..word(12) {
            if end - at < 8 {
                return Err(damaged("it ends within a section"));
            }
            let (number, processor, len) = (half(at), half(at + 2), word(at + 4) as usize);
            at += 8;
            let padded = len.checked_next_multiple_of(8).filter(|padded| *padded <= end - at);
            let padded = padded.ok_or_else(|| damaged("it ends within a section"))?;
            let part = PARTS.iter().find(|(other, _)| *other == number).map(|(_, part)| *part).ok_or_else(|| {
                Error::new(Kind::Unsupported, format!("the state of the VM has a section of the unknown kind {number}"))
                    .hint("use a newer epochfs")
            })?;
            let processor = (processor != MACHINE).then_some(processor);
            if processor.is_some() != part.is_of_processor() || processor == Some(MACHINE - 1) {
                return Err(damaged("a section is in the wrong place"));
            }
            let order = key(processor, part);
            if last.is_some_and(|last| last >= order) {
                return Err(damaged("its sections are out of order"));
            }
            if bytes[at + len..at + padded].iter().any(|byte| *byte != 0) {
                return Err(damaged("there is something between its sections"));
            }
            state.sections.insert(order, bytes[at..at + len].to_vec());
            last = Some(order);
            at += padded;
        }
        if at != end {
            return Err(damaged("there is something behind its sections"));
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::random::Seeded;

    fn example() -> VmState {
        let mut state = VmState::default();
        state.put(None, Part::Shape, (0..20).collect());
        state.put(None, Part::Serial, vec![]);
        state.put(Some(0), Part::Registers, vec![1; 144]);
        state.put(Some(1), Part::CpuId, vec![2; 40]);
        state.put(Some(1), Part::Events, vec![3; 64]);
        state
    }

    /// As it was first written: a change of the encoding needs a new version.
    #[test]
    fn the_encoding_stays_as_it_is() {
        let mut state = VmState::default();
        state.put(None, Part::Serial, vec![1, 2, 3]);
        state.put(Some(2), Part::TscKhz, vec![4, 5, 6, 7]);
        let mut bytes = b"EPFSVMST\x01\0\x01\0\x02\0\0\0".to_vec();
        bytes.extend_from_slice(&[7, 0, 0xff, 0xff, 3, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 0]);
        bytes.extend_from_slice(&[17, 0, 2, 0, 4, 0, 0, 0, 4, 5, 6, 7, 0, 0, 0, 0]);
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        assert_eq!(state.encode(), bytes);
        assert_eq!(VmState::decode(&bytes).unwrap(), state);
    }

    #[test]
    fn what_is_encoded_is_decoded_and_nothing_else() {
        let (state, bytes) = (example(), example().encode());
        assert_eq!(VmState::decode(&bytes).unwrap(), state);
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(VmState::decode(&flipped).is_err(), "byte {at}");
            assert!(VmState::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
        assert!(VmState::decode(&[bytes.clone(), vec![0; 8]].concat()).is_err());
    }

    /// Wrong content under a checksum that fits is refused too, or else decodes to what encodes to the same bytes.
    #[test]
    fn sections_that_cannot_be_are_refused() {
        let mut dice = Seeded::new(11);
        let bytes = example().encode();
        for _ in 0..20_000 {
            let mut changed = bytes.clone();
            let end = changed.len() - 4;
            for _ in 0..1 + dice.below(3) {
                let at = dice.below(end as u64) as usize;
                changed[at] = if dice.below(2) == 0 { dice.next() as u8 } else { [0, 1, 255][dice.below(3) as usize] };
            }
            if dice.below(4) == 0 {
                changed.truncate(dice.below(end as u64) as usize);
                changed.extend_from_slice(&[0; 4]);
            }
            let end = changed.len() - 4;
            let sum = crc32c::crc32c(&changed[..end]);
            changed[end..].copy_from_slice(&sum.to_le_bytes());
            if let Ok(state) = VmState::decode(&changed) {
                assert_eq!(state.encode(), changed);
            }
        }
    }

    #[test]
    fn a_newer_version_is_refused_with_advice() {
        let mut bytes = example().encode();
        bytes[8] = 2;
        let error = VmState::decode(&bytes).unwrap_err();
        assert!(error.kind() == Kind::Unsupported && error.next_step().is_some(), "{error}");
        assert_eq!(VmState::decode(b"anything").unwrap_err().kind(), Kind::Unsupported);
    }
}
