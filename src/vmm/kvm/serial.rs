//! A serial port, as far as guests here use one: what they write goes out, and nothing comes in.

use crate::error::{Error, Result};

/// The registers that keep what is written to them: interrupts, line and modem control, scratch, and the divisor's halves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Serial {
    registers: [u8; 8],
    divisor: [u8; 2],
}

const LINE_CONTROL: usize = 3;
const LINE_STATUS: usize = 5;
const MODEM_STATUS: usize = 6;
/// The first two registers are the divisor's.
const DIVISOR_ACCESS: u8 = 0x80;
/// Ready to take the next byte, and nothing on its way.
const TRANSMITTER_EMPTY: u8 = 0x60;

impl Serial {
    /// Writes to a register; returns the byte that goes out, if one does.
    pub fn write(&mut self, register: usize, value: u8) -> Option<u8> {
        let is_divisor = self.registers[LINE_CONTROL] & DIVISOR_ACCESS != 0;
        match register {
            0 | 1 if is_divisor => self.divisor[register] = value,
            0 => return Some(value),
            _ => self.registers[register & 7] = value,
        }
        None
    }

    pub fn read(&self, register: usize) -> u8 {
        let is_divisor = self.registers[LINE_CONTROL] & DIVISOR_ACCESS != 0;
        match register {
            0 | 1 if is_divisor => self.divisor[register],
            // Nothing was received, and no interrupt is pending.
            0 => 0,
            2 => 1,
            LINE_STATUS => TRANSMITTER_EMPTY,
            MODEM_STATUS => 0xb0,
            _ => self.registers[register & 7],
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        [self.registers.as_slice(), &self.divisor].concat()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self> {
        match bytes.split_first_chunk() {
            Some((registers, [low, high])) => Ok(Self { registers: *registers, divisor: [*low, *high] }),
            _ => Err(Error::damaged(format!("the state of the VM is damaged: Serial has {} bytes", bytes.len()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_out_and_registers_stay() {
        let mut serial = Serial::default();
        assert_eq!(serial.write(0, b'x'), Some(b'x'));
        serial.write(3, 0x83);
        assert_eq!((serial.write(0, 12), serial.write(1, 1), serial.read(0), serial.read(1)), (None, None, 12, 1));
        serial.write(3, 3);
        assert_eq!((serial.read(0), serial.read(5), serial.read(3)), (0, 0x60, 3));
        assert_eq!(Serial::decode(&serial.encode()).unwrap(), serial);
        assert!(Serial::decode(&[0; 9]).is_err() && Serial::decode(&[]).is_err());
    }
}
