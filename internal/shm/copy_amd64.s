//go:build !race

#include "textflag.h"

// func copyWide(dst, src []byte)
//
// The first and the last 64 bytes are read before anything is written, and written wherever they lie. All between is written in whole cache lines:
// a store across two lines costs as much as two.
TEXT ·copyWide(SB), NOSPLIT, $0-48
	MOVQ	dst_base+0(FP), DI
	MOVQ	src_base+24(FP), SI
	MOVQ	src_len+32(FP), CX
	LEAQ	-64(DI)(CX*1), R9 // where the last 64 bytes go
	VMOVDQU64	(SI), Z4
	VMOVDQU64	-64(SI)(CX*1), Z5
	VMOVDQU64	Z4, (DI)
	MOVQ	DI, R8
	ADDQ	$64, DI
	ANDQ	$~63, DI
	MOVQ	DI, R10
	SUBQ	R8, R10 // 1 to 64 bytes are done
	ADDQ	R10, SI
	SUBQ	R10, CX
four:
	CMPQ	CX, $256
	JB	one
	VMOVDQU64	(SI), Z0
	VMOVDQU64	64(SI), Z1
	VMOVDQU64	128(SI), Z2
	VMOVDQU64	192(SI), Z3
	VMOVDQA64	Z0, (DI)
	VMOVDQA64	Z1, 64(DI)
	VMOVDQA64	Z2, 128(DI)
	VMOVDQA64	Z3, 192(DI)
	ADDQ	$256, SI
	ADDQ	$256, DI
	SUBQ	$256, CX
	JMP	four
one:
	CMPQ	CX, $64
	JBE	last
	VMOVDQU64	(SI), Z0
	VMOVDQA64	Z0, (DI)
	ADDQ	$64, SI
	ADDQ	$64, DI
	SUBQ	$64, CX
	JMP	one
last:
	VMOVDQU64	Z5, (R9)
	VZEROUPPER
	RET
