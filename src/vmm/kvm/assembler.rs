//! A tiny assembler for the guests of this project: just the instructions that they are made of, each with its encoding.
//!
//! 64-bit code only. Operands are 64 bits wide unless the name says otherwise. Jumps have 32-bit displacements.

/// A general register, by its number in the encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reg {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

/// When a jump is taken, by the number in the encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Below = 2,
    AboveOrEqual = 3,
    Equal = 4,
    NotEqual = 5,
}

/// A place in the code that jumps go to.
#[derive(Clone, Copy, Debug)]
pub struct Label(usize);

/// Code being written.
#[derive(Default)]
pub struct Assembler {
    bytes: Vec<u8>,
    labels: Vec<Option<usize>>,
    /// Where the displacement of a jump stands, and to which label.
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Puts the label here.
    pub fn place(&mut self, label: Label) {
        assert!(self.labels[label.0].replace(self.bytes.len()).is_none(), "a label is placed once");
    }

    /// A label that is placed here.
    pub fn here(&mut self) -> Label {
        let label = self.label();
        self.place(label);
        label
    }

    /// Where a label lies, from the beginning of the code.
    pub fn offset(&self, label: Label) -> u64 {
        self.labels[label.0].expect("the label is placed") as u64
    }

    /// The code, with all jumps filled in.
    pub fn finish(mut self) -> Vec<u8> {
        for (at, label) in std::mem::take(&mut self.jumps) {
            let target = self.offset(label) as i64;
            let displacement = i32::try_from(target - (at as i64 + 4)).expect("guests are small");
            self.bytes[at..at + 4].copy_from_slice(&displacement.to_le_bytes());
        }
        self.bytes
    }

    fn emit(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// REX.W with the high bits of both registers, the opcode, and a ModRM byte that names two registers.
    fn registers(&mut self, opcode: &[u8], reg: u8, rm: u8) {
        self.emit(&[0x48 | (reg >> 3) << 2 | rm >> 3]);
        self.emit(opcode);
        self.emit(&[0xc0 | (reg & 7) << 3 | rm & 7]);
    }

    /// The same with memory at a register and a 32-bit displacement.
    fn memory(&mut self, opcode: u8, reg: Reg, base: Reg, displacement: i32) {
        assert!(base as u8 & 7 != 4, "rsp and r12 as a base would need another byte");
        let (reg, base) = (reg as u8, base as u8);
        self.emit(&[0x48 | (reg >> 3) << 2 | base >> 3, opcode, 0x80 | (reg & 7) << 3 | base & 7]);
        self.emit(&displacement.to_le_bytes());
    }

    /// REX.W 81 /extension id: an operation with a sign-extended 32-bit number.
    fn number(&mut self, extension: u8, to: Reg, number: i32) {
        self.registers(&[0x81], extension, to as u8);
        self.emit(&number.to_le_bytes());
    }

    /// `mov to, number`: REX.W B8+r io
    pub fn set(&mut self, to: Reg, number: u64) {
        self.emit(&[0x48 | to as u8 >> 3, 0xb8 | to as u8 & 7]);
        self.emit(&number.to_le_bytes());
    }

    /// `mov to, from`: REX.W 89 /r
    pub fn copy(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x89], from as u8, to as u8);
    }

    /// `mov to, [base + displacement]`: REX.W 8B /r
    pub fn load(&mut self, to: Reg, base: Reg, displacement: i32) {
        self.memory(0x8b, to, base, displacement);
    }

    /// `mov [base + displacement], from`: REX.W 89 /r
    pub fn store(&mut self, base: Reg, displacement: i32, from: Reg) {
        self.memory(0x89, from, base, displacement);
    }

    /// `add to, from`: REX.W 01 /r
    pub fn add(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x01], from as u8, to as u8);
    }

    /// `or to, from`: REX.W 09 /r
    pub fn or(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x09], from as u8, to as u8);
    }

    /// `xor to, from`: REX.W 31 /r
    pub fn xor(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x31], from as u8, to as u8);
    }

    /// `cmp a, b`: REX.W 39 /r
    pub fn compare(&mut self, a: Reg, b: Reg) {
        self.registers(&[0x39], b as u8, a as u8);
    }

    /// `imul to, from`: REX.W 0F AF /r
    pub fn multiply(&mut self, to: Reg, from: Reg) {
        self.registers(&[0x0f, 0xaf], to as u8, from as u8);
    }

    /// `add to, number`: REX.W 81 /0 id
    pub fn add_number(&mut self, to: Reg, number: i32) {
        self.number(0, to, number);
    }

    /// `and to, number`: REX.W 81 /4 id
    pub fn and_number(&mut self, to: Reg, number: i32) {
        self.number(4, to, number);
    }

    /// `cmp to, number`: REX.W 81 /7 id
    pub fn compare_number(&mut self, to: Reg, number: i32) {
        self.number(7, to, number);
    }

    /// `shl to, bits`: REX.W C1 /4 ib
    pub fn shift_left(&mut self, to: Reg, bits: u8) {
        self.registers(&[0xc1], 4, to as u8);
        self.emit(&[bits]);
    }

    /// `shr to, bits`: REX.W C1 /5 ib
    pub fn shift_right(&mut self, to: Reg, bits: u8) {
        self.registers(&[0xc1], 5, to as u8);
        self.emit(&[bits]);
    }

    /// `jmp label`: E9 cd
    pub fn jump(&mut self, label: Label) {
        self.emit(&[0xe9]);
        self.displacement(label);
    }

    /// `jcc label`: 0F 80+cc cd
    pub fn jump_if(&mut self, when: When, label: Label) {
        self.emit(&[0x0f, 0x80 | when as u8]);
        self.displacement(label);
    }

    /// `call label`: E8 cd
    pub fn call(&mut self, label: Label) {
        self.emit(&[0xe8]);
        self.displacement(label);
    }

    /// `ret`: C3
    pub fn ret(&mut self) {
        self.emit(&[0xc3]);
    }

    fn displacement(&mut self, label: Label) {
        self.jumps.push((self.bytes.len(), label));
        self.emit(&[0; 4]);
    }

    /// `push from`: REX.B 50+r
    pub fn push(&mut self, from: Reg) {
        self.emit(&[0x40 | from as u8 >> 3, 0x50 | from as u8 & 7]);
    }

    /// `pop to`: REX.B 58+r
    pub fn pop(&mut self, to: Reg) {
        self.emit(&[0x40 | to as u8 >> 3, 0x58 | to as u8 & 7]);
    }

    /// `out port, al`: E6 ib
    pub fn out_byte(&mut self, port: u8) {
        self.emit(&[0xe6, port]);
    }

    /// `out dx, al`: EE
    pub fn out_byte_dx(&mut self) {
        self.emit(&[0xee]);
    }

    /// `out dx, eax`: EF
    pub fn out_word_dx(&mut self) {
        self.emit(&[0xef]);
    }

    /// `rdtsc`: 0F 31. Leaves the time stamp in edx:eax.
    pub fn read_time_stamp(&mut self) {
        self.emit(&[0x0f, 0x31]);
    }

    /// `rdmsr`: 0F 32. Reads the register ecx into edx:eax.
    pub fn read_model_register(&mut self) {
        self.emit(&[0x0f, 0x32]);
    }

    /// `movdqu xmm, [base + displacement]`: F3 0F 6F /r, with one of the first eight of both kinds of registers
    pub fn load_vector(&mut self, xmm: u8, base: Reg, displacement: i32) {
        self.vector(0x6f, xmm, base, displacement);
    }

    /// `movdqu [base + displacement], xmm`: F3 0F 7F /r
    pub fn store_vector(&mut self, base: Reg, displacement: i32, xmm: u8) {
        self.vector(0x7f, xmm, base, displacement);
    }

    fn vector(&mut self, opcode: u8, xmm: u8, base: Reg, displacement: i32) {
        let base = base as u8;
        assert!(xmm < 8 && base < 8 && base != 4, "these would need another byte");
        self.emit(&[0xf3, 0x0f, opcode, 0x80 | xmm << 3 | base]);
        self.emit(&displacement.to_le_bytes());
    }

    /// `mov to, dr`: REX.B 0F 21 /r
    pub fn read_debug(&mut self, to: Reg, debug: u8) {
        self.emit(&[0x40 | to as u8 >> 3, 0x0f, 0x21, 0xc0 | debug << 3 | to as u8 & 7]);
    }

    /// `iretq`: REX.W CF
    pub fn return_from_interrupt(&mut self) {
        self.emit(&[0x48, 0xcf]);
    }

    /// `sti`: FB
    pub fn allow_interrupts(&mut self) {
        self.emit(&[0xfb]);
    }

    /// `hlt`: F4
    pub fn halt(&mut self) {
        self.emit(&[0xf4]);
    }
}

#[cfg(test)]
mod tests {
    use super::Reg::{R9, R12, R13, Rax, Rbx, Rdi, Rdx};
    use super::*;

    /// What another assembler (GNU as) makes of the same instructions.
    #[test]
    fn instructions_are_encoded_as_the_manual_says() {
        type Write = fn(&mut Assembler);
        let cases: [(Write, &[u8]); 18] = [
            (|a| a.set(R9, 0x1122_3344_5566_7788), &[0x49, 0xb9, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]),
            (|a| a.copy(R12, Rdx), &[0x49, 0x89, 0xd4]),
            (|a| a.load(Rdx, Rdi, 8), &[0x48, 0x8b, 0x97, 8, 0, 0, 0]),
            (|a| a.store(R13, -8, R12), &[0x4d, 0x89, 0xa5, 0xf8, 0xff, 0xff, 0xff]),
            (|a| a.add(Rdi, R9), &[0x4c, 0x01, 0xcf]),
            (|a| a.xor(R12, Rdi), &[0x49, 0x31, 0xfc]),
            (|a| a.compare(R12, Rax), &[0x49, 0x39, 0xc4]),
            (|a| a.multiply(R12, R9), &[0x4d, 0x0f, 0xaf, 0xe1]),
            (|a| a.add_number(Rbx, 1), &[0x48, 0x81, 0xc3, 1, 0, 0, 0]),
            (|a| a.and_number(Rax, 3), &[0x48, 0x81, 0xe0, 3, 0, 0, 0]),
            (|a| a.compare_number(R9, -1), &[0x49, 0x81, 0xf9, 0xff, 0xff, 0xff, 0xff]),
            (|a| a.shift_left(Rax, 12), &[0x48, 0xc1, 0xe0, 12]),
            (|a| a.shift_right(R9, 33), &[0x49, 0xc1, 0xe9, 33]),
            (|a| a.push(R12), &[0x41, 0x54]),
            (|a| a.load_vector(5, Rdi, 16), &[0xf3, 0x0f, 0x6f, 0xaf, 16, 0, 0, 0]),
            (|a| a.store_vector(Rbx, 32, 3), &[0xf3, 0x0f, 0x7f, 0x9b, 32, 0, 0, 0]),
            (|a| a.read_debug(R12, 1), &[0x41, 0x0f, 0x21, 0xcc]),
            (|a| a.return_from_interrupt(), &[0x48, 0xcf]),
        ];
        for (number, (write, bytes)) in cases.into_iter().enumerate() {
            let mut assembler = Assembler::default();
            write(&mut assembler);
            assert_eq!(assembler.finish(), bytes, "instruction {number}");
        }
    }

    #[test]
    fn jumps_go_to_their_labels() {
        let mut a = Assembler::default();
        let end = a.label();
        let start = a.here();
        a.jump_if(When::Below, end);
        a.jump(start);
        a.place(end);
        assert_eq!(a.finish(), [0x0f, 0x82, 5, 0, 0, 0, 0xe9, 0xf5, 0xff, 0xff, 0xff]);
    }
}
