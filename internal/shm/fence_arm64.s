#include "textflag.h"

// func Fence()
TEXT ·Fence(SB), NOSPLIT, $0-0
	DMB	$0xB // ISH: all loads and stores, inner shareable
	RET

// func StoreFence16(p *uint16, v uint16)
TEXT ·StoreFence16(SB), NOSPLIT, $0-10
	MOVD	p+0(FP), R0
	MOVHU	v+8(FP), R1
	MOVH	R1, (R0)
	DMB	$0xB
	RET
