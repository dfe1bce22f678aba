#include "textflag.h"

// func Fence()
TEXT ·Fence(SB), NOSPLIT, $0-0
	MFENCE
	RET

// func StoreFence16(p *uint16, v uint16)
TEXT ·StoreFence16(SB), NOSPLIT, $0-10
	MOVQ	p+0(FP), BX
	MOVW	v+8(FP), AX
	XCHGW	AX, 0(BX) // locked by itself: store and fence in one
	RET
