#include "textflag.h"

// func prefetchWrite(p *byte, n int)
TEXT ·prefetchWrite(SB), NOSPLIT, $0-16
	MOVQ	p+0(FP), BX
	MOVQ	n+8(FP), CX
	ADDQ	BX, CX
	ANDQ	$~63, BX
next:
	BYTE	$0x0f; BYTE $0x0d; BYTE $0x0b // PREFETCHW (BX), which the assembler does not know
	ADDQ	$64, BX
	CMPQ	BX, CX
	JB	next
	RET

// func prefetchRead(p *byte, n int)
TEXT ·prefetchRead(SB), NOSPLIT, $0-16
	MOVQ	p+0(FP), BX
	MOVQ	n+8(FP), CX
	ADDQ	BX, CX
	ANDQ	$~63, BX
next:
	PREFETCHT0	(BX)
	ADDQ	$64, BX
	CMPQ	BX, CX
	JB	next
	RET
